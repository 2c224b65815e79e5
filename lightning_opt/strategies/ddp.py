"""Data parallelism: every process holds the whole model and its share of each batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override


class StaticGraphDDP(DDPStrategy):
    """DDP with a static graph, also where gradients are accumulated.

    torch learns the order of gradients in a wrapper's first backward, and fails when that one is not reduced. The first
    one is therefore reduced like a last one: a mean of means that are equal everywhere stays what it is.
    """

    _learnt: object = None

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        if self._learnt is not self.model:
            self._learnt = self.model
            yield
            return
        with super().block_backward_sync():
            yield


def ddp(
    *,
    timeout_s: float = 300.0,
    find_unused_parameters: bool = False,
    static_graph: bool = False,
    **options: Any,
) -> DDPStrategy:
    """Return Lightning's DDP with a timeout that ends a job whose peer hangs.

    The teacher is outside the student's module tree, so it is neither broadcast nor waited for, and every parameter of
    the student and of the losses gets a gradient in every step: unused ones need not be looked for.

    Args:
        timeout_s: After how many seconds without an answer a peer counts as lost.
        find_unused_parameters: For a model of which some parameters get no gradient in some steps; slower.
        static_graph: Promises that every step runs the same operations, so that the order of gradients is learnt once;
            needed for activation checkpointing that reenters, and allows parameters that never get a gradient. Safe for
            training alone and for distillation whose terms have constant weights. Not safe where what is computed
            changes: loss weights that a schedule takes to or from 0, sampled batches (`loss.sampling`), quantizers
            that are switched on later, random depth. A pruner's shrink wraps the model anew, which is safe.
        **options: Passed on to `DDPStrategy`.
    """
    strategy = StaticGraphDDP if static_graph else DDPStrategy
    return strategy(
        timeout=timedelta(seconds=timeout_s),
        find_unused_parameters=find_unused_parameters,
        static_graph=static_graph,
        gradient_as_bucket_view=True,
        **options,
    )


def auto() -> str:
    """Let Lightning choose: one process for one device, DDP for several."""
    return "auto"
