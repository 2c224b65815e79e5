"""Data parallelism: every process holds the whole model and its share of each batch."""

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy


def ddp(*, timeout_s: float = 300.0, find_unused_parameters: bool = False, **options: Any) -> DDPStrategy:
    """Return Lightning's DDP with a timeout that ends a job whose peer hangs.

    The teacher is outside the student's module tree, so it is neither broadcast nor waited for, and every parameter of
    the student and of the losses gets a gradient in every step: unused ones need not be looked for.

    Args:
        timeout_s: After how many seconds without an answer a peer counts as lost.
        find_unused_parameters: For a model of which some parameters get no gradient in some steps; slower.
        **options: Passed on to `DDPStrategy`.
    """
    return DDPStrategy(
        timeout=timedelta(seconds=timeout_s),
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
        **options,
    )


def auto() -> str:
    """Let Lightning choose: one process for one device, DDP for several."""
    return "auto"
