"""How much of the time each process of a pipeline waits, measured and by the schedule's theory."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

Operation: TypeAlias = tuple[str, int, int]  # kind, stage, micro-batch


@dataclass
class Clock:
    """Notes how long each piece of work took, while it is on.

    Attributes:
        is_on: Whether anything is noted. On an accelerator each piece of work is then waited for.
        seconds: Of each operation, one number a step.
        steps: Of each whole step.
    """

    is_on: bool = False
    seconds: dict[Operation, list[float]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    @contextmanager
    def note(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Note one operation: "F" forward, "B" backward, or its halves "I" (inputs) and "W" (weights)."""
        if not self.is_on:
            yield
            return
        begin = _now()
        yield
        self.seconds.setdefault((kind, stage, micro_batch), []).append(_now() - begin)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Note a whole step."""
        if not self.is_on:
            yield
            return
        begin = _now()
        yield
        self.steps.append(_now() - begin)

    def clear(self) -> None:
        """Forget everything."""
        self.seconds.clear()
        self.steps.clear()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def simulate(
    order: Mapping[int, Sequence[Operation]], seconds: Mapping[tuple[str, int], float], *, stages: int
) -> tuple[float, dict[int, float]]:
    """Work through a schedule with given times and no cost of communication.

    Args:
        order: What each process does, one operation after the other.
        seconds: Of each kind of operation on each stage.
        stages: How many there are.

    Returns:
        How long it takes, and how long each process works.

    Raises:
        ValueError: The order waits for itself.
    """
    waiting = {process: list(row) for process, row in order.items()}
    free = dict.fromkeys(order, 0.0)
    busy = dict.fromkeys(order, 0.0)
    done: dict[Operation, float] = {}
    while any(waiting.values()):
        moved = False
        for process, row in waiting.items():
            while row and (ready := _ready(row[0], done, stages)) is not None:
                operation = row.pop(0)
                cost = seconds[operation[:2]]
                free[process] = max(free[process], ready) + cost
                busy[process] += cost
                done[operation] = free[process]
                moved = True
        if not moved:
            raise ValueError("the schedule waits for itself")
    return max(free.values()), busy


def _ready(operation: Operation, done: Mapping[Operation, float], stages: int) -> float | None:
    """Return when everything that an operation needs is there; None where something is not done yet."""
    kind, stage, micro_batch = operation
    if kind == "F":
        needed = [] if stage == 0 else [[("F", stage - 1, micro_batch)]]
    elif kind == "W":
        needed = [[("I", stage, micro_batch)]]
    else:
        needed = [[("F", stage, micro_batch)]]
        if stage < stages - 1:
            needed.append([("B", stage + 1, micro_batch), ("I", stage + 1, micro_batch)])
    times = [next((done[one] for one in either if one in done), None) for either in needed]
    return None if any(one is None for one in times) else max((one for one in times if one is not None), default=0.0)


def order_of(schedule: Any) -> dict[int, list[Operation]]:
    """Return what each process does in one of torch's schedules."""
    if isinstance(schedule, Schedule1F1B | ScheduleGPipe):  # torch's own list leaves forward passes out
        count, parts = schedule._num_stages, schedule._n_microbatches
        ahead = [parts if isinstance(schedule, ScheduleGPipe) else min(parts, count - n) for n in range(count)]
        return {n: one_by_one(n, ahead=ahead[n], micro_batches=parts) for n in range(count)}
    order = schedule.pipeline_order
    return {process: [_read(one) for one in row if _is_work(one)] for process, row in order.items()}


def one_by_one(stage: int, *, ahead: int, micro_batches: int) -> list[Operation]:
    """Return what a stage does that is some forward passes ahead before its backward passes alternate with them.

    >>> one_by_one(0, ahead=1, micro_batches=2)
    [('F', 0, 0), ('B', 0, 0), ('F', 0, 1), ('B', 0, 1)]
    """
    forward = [("F", stage, n) for n in range(micro_batches)]
    backward = [("B", stage, n) for n in range(micro_batches)]
    steady = [one for pair in zip(backward, forward[ahead:], strict=False) for one in pair]
    return [*forward[:ahead], *steady, *backward[micro_batches - ahead :]]


def _is_work(action: Any) -> bool:
    return action is not None and action.computation_type.value in ("F", "B", "I", "W")


def _read(action: Any) -> Operation:
    return action.computation_type.value, action.stage_index, action.microbatch_index


@dataclass(frozen=True)
class Bubble:
    """How much of a step the processes of a pipeline waited.

    Attributes:
        step_s: Seconds of a step, the median of those measured.
        measured: Share of a step in which each process did no work.
        theory: The same if communication cost nothing and each operation took its measured median.
        ideal: The same if all operations of a kind took equally long on all stages, as the schedule's authors count.
        seconds: Median of each kind of operation on each stage.
    """

    step_s: float
    measured: list[float]
    theory: list[float]
    ideal: list[float]
    seconds: dict[tuple[str, int], float]

    def __str__(self) -> str:
        rows = [
            f"process {n}: waits {real:.1%} of a step, {said:.1%} by its own times, {even:.1%} with even stages"
            for n, (real, said, even) in enumerate(zip(self.measured, self.theory, self.ideal, strict=True))
        ]
        return "\n".join([f"a step takes {self.step_s * 1e3:.2f} ms", *rows])


def bubble_report(strategy: Any) -> Bubble:
    """Compare how long the processes of a pipeline waited with what its schedule says; every process must ask.

    Switch `strategy.clock.is_on` on before, for steps with batches of one size. The trial run of shapes is not counted,
    nor is what a step does beside the schedule (reading batches, the teacher, the optimizer).

    Args:
        strategy: A `PipelineStrategy` that has trained, before or after its trainer is done.

    Raises:
        ValueError: Nothing was noted.
    """
    clock, group = strategy.clock, strategy.pipeline_group
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (clock.seconds, clock.steps), group=group)
    if not all(steps for _, steps in every):
        raise ValueError("no step was noted: set strategy.clock.is_on = True before training")
    medians = {operation: median(times) for seconds, _ in every for operation, times in seconds.items()}
    kinds = {operation[:2] for operation in medians}
    seconds = {kind: fmean(time for one, time in medians.items() if one[:2] == kind) for kind in kinds}
    even = {kind: fmean(time for one, time in seconds.items() if one[0] == kind[0]) for kind in kinds}
    order = strategy.order
    return Bubble(
        step_s=median(steps := [max(row) for row in zip(*(steps for _, steps in every), strict=False)]),
        measured=[1.0 - sum(sum(times) for times in mine.values()) / sum(steps[: len(own)]) for mine, own in every],
        theory=_waits(*simulate(order, seconds, stages=strategy.stage_count)),
        ideal=_waits(*simulate(order, even, stages=strategy.stage_count)),
        seconds=seconds,
    )


def _waits(total: float, busy: Mapping[int, float]) -> list[float]:
    return [1.0 - busy[process] / total for process in sorted(busy)]
