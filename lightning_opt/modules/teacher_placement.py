"""Where a teacher lives while a student is trained: whole on every rank, or spread over several.

Where it lives never changes what it says beyond rounding, and the student's wrapper, optimizer and checkpoint know of
none of it.
"""

from typing import Any, Literal, TypeAlias, get_args

import torch.distributed as dist
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.modules.teacher_placement_whole import Held, Replicated

__all__ = ["PLACEMENTS", "Held", "Placement", "Replicated", "check_placement", "place"]

Placement: TypeAlias = Literal["replicated", "sharded", "tensor_parallel", "pipeline", "ranks"]
PLACEMENTS: tuple[str, ...] = get_args(Placement)

_NOT_CONTIGUOUS = ("sharded", "tensor_parallel")  # both cut weights that lie in memory as their shape says


def check_placement(
    placement: str | None,
    strategy: Any,
    processes: int,
    *,
    ranks: int | None = None,
    dtype: str | None = None,
    compile: bool = False,
    channels_last: bool = False,
) -> None:
    """Refuse a place that a teacher cannot take, before anything starts.

    Args:
        placement: `teacher.placement`; None: "replicated".
        strategy: The trainer's, as an object or by its name.
        processes: Of the job, on all nodes.
        ranks: `teacher.ranks`.
        dtype: `teacher.dtype`.
        compile: `teacher.compile`.
        channels_last: `teacher.channels_last`.

    Raises:
        ConfigError: Naming both keys.
    """
    if placement in (None, "replicated"):
        if ranks is not None:
            raise ConfigError(
                f"teacher.ranks={ranks} has no meaning with teacher.placement=replicated, which is whole on every "
                "rank; set teacher.ranks=null or choose teacher.placement=sharded"
            )
        return
    if placement not in PLACEMENTS:
        raise ConfigError(f"teacher.placement must be one of {', '.join(PLACEMENTS)}, not {placement!r}")
    named = f"teacher.placement={placement}"
    if placement == "ranks":
        raise ConfigError(
            f"{named} cannot be combined with strategy={_name_of(strategy)}: Lightning's barriers, metrics and "
            "checkpoints wait for every rank of the job, so none can be kept apart to answer; choose "
            "teacher.placement=sharded or pipeline"
        )
    if processes < 2:
        raise ConfigError(
            f"{named} needs several processes; set trainer.devices=2 strategy=ddp or teacher.placement=null"
        )
    if ranks is not None and (ranks < 2 or processes % ranks):
        raise ConfigError(
            f"teacher.ranks={ranks}: one copy of the teacher under {named} is spread over a number of ranks that "
            f"divides the {processes} processes of trainer.devices times trainer.num_nodes and is at least 2"
        )
    if compile:
        raise ConfigError(f"{named} and teacher.compile=true: torch.compile does not see what is spread; drop one")
    if channels_last and placement in _NOT_CONTIGUOUS:
        raise ConfigError(f"{named} and teacher.channels_last=true: such weights cannot be cut in slices; drop one")
    if dtype == "int8" and placement == "tensor_parallel":
        raise ConfigError(
            f"{named} and teacher.dtype=int8: the tensor plans cut floating-point layers; choose "
            "teacher.placement=sharded or teacher.dtype=bfloat16"
        )


def _name_of(strategy: Any) -> str:
    if isinstance(strategy, str):
        return strategy
    return "auto" if strategy is None else str(getattr(strategy, "strategy_name", type(strategy).__name__))


def place(
    network: nn.Module, placement: str, strategy: Any, *, ranks: int | None = None, example: Inputs | None = None
) -> Replicated:
    """Put a network where it answers from while a student is trained; collective where it is spread.

    Args:
        network: Changed in place; `release` of what is returned gives it back whole.
        placement: Where.
        strategy: The trainer's, set up.
        ranks: Over how many ranks one copy is spread; None: all.
        example: A small batch, the same on all ranks; a pipeline is cut by it.

    Raises:
        ConfigError: It cannot be put there.
    """
    device = strategy.root_device
    if placement == "replicated":
        # A pipeline asks on the ranks where a loss compares; the others may never need it.
        needed = getattr(getattr(strategy, "engine", None), "needs_teacher", True)
        return Replicated(network, device, at_once=needed)
    world = dist.get_world_size() if dist.is_initialized() else 1
    check_placement(placement, strategy, world, ranks=ranks)
    count = ranks or world
    if placement == "sharded":
        from lightning_opt.modules.teacher_placement_sharded import Sharded

        return Sharded(network, device, ranks=count)
    from lightning_opt.modules.teacher_placement_exchange import circle_of

    circle = circle_of(strategy, count)
    if placement == "tensor_parallel":
        from lightning_opt.modules.teacher_placement_tensor import TensorParallel

        return TensorParallel(network, device, circle)
    from lightning_opt.modules.teacher_placement_pipeline import Pipelined

    if example is None:
        raise ConfigError("teacher.placement=pipeline: the teacher was never shown a batch by which it can be cut")
    return Pipelined(network, device, circle, example=example)
