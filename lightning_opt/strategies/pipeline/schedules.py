"""Which stage works on which micro-batch, and when: names of schedules, what each needs, and the engine's objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from lightning_opt.errors import ConfigError
from lightning_opt.strategies.pipeline.bubble import Clock
from lightning_opt.strategies.pipeline.work import StageWork


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A schedule.

    Attributes:
        engine: torch's class.
        per_process: How many stages a process has unless told otherwise.
        several: Whether it may have more than one; torch's classes then take a list of stages.
        exactly: Whether it must be just that many.
        in_v: Whether the stages come back: the first process has the first and the last.
    """

    engine: Callable[..., Any]
    per_process: int = 1
    several: bool = False
    exactly: bool = True
    in_v: bool = False


SCHEDULES = {
    "gpipe": Kind(engine=ScheduleGPipe),
    "1f1b": Kind(engine=Schedule1F1B),
    "interleaved_1f1b": Kind(engine=ScheduleInterleaved1F1B, per_process=2, several=True, exactly=False),
    "zero_bubble": Kind(engine=ScheduleInterleavedZeroBubble, several=True, exactly=False),
    "zbv": Kind(engine=ScheduleZBVZeroBubble, per_process=2, several=True, in_v=True),
}
"""GPipe: Huang et al. 2019, arXiv 1811.06965. 1F1B and its interleaved form: Narayanan et al. 2021, arXiv 2104.04473.
Zero bubble (ZB1P) and ZB-V: Qi et al. 2023, arXiv 2401.10241."""


def stages_per_process(schedule: str, stages: int | None, processes: int) -> int:
    """Return how many stages each process of a pipeline has.

    Raises:
        ConfigError: The stages are not a multiple of the processes, or not as many as the schedule needs.
    """
    kind = SCHEDULES[schedule]
    if stages is None:
        return kind.per_process
    if stages % processes:
        raise ConfigError(
            f"strategy.stages={stages} is no multiple of the {processes} processes of the pipeline; choose "
            f"{processes * kind.per_process}"
        )
    each = stages // processes
    if each != kind.per_process and kind.exactly:
        other = "; schedule=interleaved_1f1b takes more" if kind.per_process == 1 else ""
        raise ConfigError(
            f"strategy.stages={stages} on {processes} processes makes {each} stages each, and strategy.schedule="
            f"{schedule} takes {kind.per_process}: set stages={processes * kind.per_process}{other}"
        )
    return each


def placement(schedule: str, stages: int, processes: int) -> list[int]:
    """Return on which process of the pipeline each stage is.

    >>> placement("interleaved_1f1b", 4, 2), placement("zbv", 4, 2)
    ([0, 1, 0, 1], [0, 1, 1, 0])
    """
    if SCHEDULES[schedule].in_v:
        return [n if n < processes else stages - 1 - n for n in range(stages)]
    return [n % processes for n in range(stages)]


def micro_batches_for(size: int, wanted: int) -> int:
    """Return the largest number of equal parts, at most `wanted`, into which a batch can be cut.

    >>> micro_batches_for(32, 4), micro_batches_for(6, 4), micro_batches_for(7, 4)
    (4, 3, 1)
    """
    return max(parts for parts in range(1, min(size, wanted) + 1) if size % parts == 0)


class TimedStage(PipelineStage):
    """A stage that can say when it worked on what, and whose trial run (for shapes) leaves no trace.

    Args:
        work: What it does.
        number: Which stage it is.
        stages: Of how many.
        device: Where.
        group: The processes of the pipeline.
        clock: Notes its work.
    """

    def __init__(
        self,
        work: StageWork,
        number: int,
        stages: int,
        *,
        device: torch.device,
        group: dist.ProcessGroup,
        clock: Clock,
    ) -> None:
        super().__init__(work, number, stages, device, group=group)
        self.work, self.clock = work, clock

    def _compute_outputs(self, *args: Tensor, module: Any, **kwargs: Any) -> Any:
        with self.work.trial():
            return module(*args, **kwargs)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.clock.note("F", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.clock.note("I" if kwargs.get("full_backward") is False else "B", self.stage_index, bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.clock.note("W", self.stage_index, bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)


def make_schedule(
    schedule: str,
    works: Sequence[StageWork],
    *,
    stages: int,
    micro_batches: int,
    device: torch.device,
    group: dist.ProcessGroup,
    clock: Clock,
) -> Any:
    """Return torch's schedule for a number of micro-batches.

    Where the schedule asked for cannot do with so few or so odd a number of them (the last batch of an epoch), it is
    one that can: all forward, then all backward.
    """
    made: list[Any] = [
        TimedStage(work, work.stage.number, stages, device=device, group=group, clock=clock) for work in works
    ]
    kind = SCHEDULES[schedule]
    options: dict[str, Any] = {"n_microbatches": micro_batches, "loss_fn": _said_already, "scale_grads": False}
    try:
        return kind.engine(made if kind.several else made[0], **options)
    except ValueError:
        if kind.in_v:
            raise
        return ScheduleLoopedBFS(made, **options) if kind.several else ScheduleGPipe(made[0], **options)


def _said_already(said: Tensor, target: Tensor) -> Tensor:
    """Return the loss, which is what the last stage says."""
    return said.sum()
