"""Run torch's schedules with real stages in forked processes, and write down when each operation began and ended."""

import contextlib
import fcntl
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from orders import SCHEDULES, is_single
from relay import share_one_heap
from simulator import Link, Op
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from lightning_opt.models.transformer import TransformerBlock
from lightning_opt.testing.ranks import on_ranks

TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained: equal transformer blocks, so that stages are equal and the bubble is the schedule's alone.

    Attributes:
        blocks: Blocks of the whole model.
        dim: Their width.
        samples: Sequences of 64 tokens in a micro-batch.
        steps: Steps that are measured, after two that are not.
        repeats: How often all processes are made anew: where one's memory lies makes its operations some percent
            faster or slower than another's, for as long as it lives.
    """

    blocks: int = 16
    dim: int = 128
    samples: int = 4
    steps: int = 5
    repeats: int = 5

    @property
    def message_bytes(self) -> int:
        return self.samples * TOKENS * self.dim * 4


@dataclass(frozen=True)
class Done:
    """One operation of one rank in one step: on the clock, and in this thread's time on the CPU."""

    op: Op
    begin_s: float
    end_s: float
    cpu_s: float


Trace = list[list[list[Done]]]  # by step, by rank, in the order in which it was done


def trace(name: str, *, ranks: int, micro_batches: int, setting: Setting, alone: bool) -> Trace:
    """Train some steps under a schedule, one process a rank.

    Args:
        name: Of the schedule.
        ranks: Processes.
        micro_batches: Of a step.
        setting: What is trained.
        alone: One operation at a time over all processes, so that none takes another's cache or core: its time is what
            it is on a machine with a core for each rank. Otherwise as it comes, each process on a core of its own.
    """
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.NamedTemporaryFile() as token:

        def job() -> list[list[list[Any]]]:
            rank = dist.get_rank()
            share_one_heap()
            gc.freeze()
            if not alone:
                os.sched_setaffinity(0, {cores[rank]})
            turn = _turns(token.name) if alone else contextlib.nullcontext
            log: list[tuple[Any, ...]] = []
            schedule, stages = _schedule(name, rank, ranks, micro_batches, setting)
            for stage in stages:
                _note(stage, log, turn)
            _note_loss(schedule, log, turn)
            return [[list(done) for done in step] for step in _steps(schedule, stages, log, micro_batches, setting)]

        found = [on_ranks(job, ranks=ranks, group=True, timeout_s=280.0) for _ in range(setting.repeats)]
    return [
        [[Done((k, s, m), b, e, c) for k, s, m, b, e, c in rank[step]] for rank in processes]
        for processes in found
        for step in range(setting.steps)
    ]


Turn = Callable[[], contextlib.AbstractContextManager[None]]


def _turns(path: str) -> Turn:
    token = open(path)  # noqa: SIM115 - until the process ends

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        fcntl.flock(token, fcntl.LOCK_EX)
        yield
        fcntl.flock(token, fcntl.LOCK_UN)

    return turn


def _steps(
    schedule: Any, stages: list[PipelineStage], log: list[tuple[Any, ...]], micro_batches: int, setting: Setting
) -> list[list[tuple[Any, ...]]]:
    batch = torch.randn(micro_batches * setting.samples, TOKENS, setting.dim)
    gives = {"target": torch.zeros(micro_batches * setting.samples, 1)} if any(s.is_last for s in stages) else {}
    takes = (batch,) if any(stage.is_first for stage in stages) else ()
    kept = []
    for step in range(-2, setting.steps):
        log.clear()
        dist.barrier()
        schedule.step(*takes, **gives, return_outputs=False)
        if step >= 0:
            kept.append(list(log))
        for stage in stages:
            stage.submod.zero_grad(set_to_none=False)
    return kept


def _schedule(
    name: str, rank: int, ranks: int, micro_batches: int, setting: Setting
) -> tuple[Any, list[PipelineStage]]:
    mine = [rank] if is_single(name) else [rank, rank + ranks]
    if name == "ZBV":
        mine = [rank, 2 * ranks - 1 - rank]
    count = ranks * len(mine)
    torch.manual_seed(rank)
    modules = [_blocks(setting, setting.blocks // count) for _ in mine]
    stages = [
        PipelineStage(module, number, count, torch.device("cpu")) for module, number in zip(modules, mine, strict=True)
    ]
    schedule: Any = SCHEDULES[name](
        stages[0] if is_single(name) else stages,  # type: ignore[arg-type]
        micro_batches,
        loss_fn=lambda answer, _: answer.square().mean(),
        scale_grads=False,
    )
    return schedule, stages


def _blocks(setting: Setting, count: int) -> nn.Module:
    made = (TransformerBlock(setting.dim, heads=setting.dim // 32, hidden=4 * setting.dim) for _ in range(count))
    return nn.Sequential(*made)


def _note(stage: Any, log: list[tuple[Any, ...]], turn: Turn) -> None:
    """Write down each operation of a stage."""
    forward, backward, weights = stage.forward_one_chunk, stage.backward_one_chunk, stage.backward_weight_one_chunk

    def timed(kind: str, micro: int, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with turn():
            begun, cpu = time.perf_counter(), time.thread_time()
            answer = call(micro, *args, **options)
            log.append((kind, stage.stage_index, micro, begun, time.perf_counter(), time.thread_time() - cpu))
        return answer

    def noted_backward(micro: int, *args: Any, **options: Any) -> Any:
        return timed("B" if options.get("full_backward", True) else "I", micro, backward, *args, **options)

    stage.forward_one_chunk = lambda micro, *args, **options: timed("F", micro, forward, *args, **options)
    stage.backward_one_chunk = noted_backward
    stage.backward_weight_one_chunk = lambda micro, *args, **options: timed("W", micro, weights, *args, **options)


def _note_loss(schedule: Any, log: list[tuple[Any, ...]], turn: Turn) -> None:
    """Count the loss with the last stage's forward, which it follows."""
    compute = schedule._compute_loss

    def noted(*args: Any, **options: Any) -> Tensor:
        with turn():
            cpu = time.thread_time()
            loss = compute(*args, **options)
        kind, stage, micro, begun, _, before = log.pop()
        log.append((kind, stage, micro, begun, time.perf_counter(), before + time.thread_time() - cpu))
        return loss

    schedule._compute_loss = noted


def link(message_bytes: int, *, turns: int = 200) -> Link:
    """Measure gloo between two processes of this machine: a short message's time, and what a long one adds."""

    def job() -> list[float]:
        return [_one_way_s(size, turns) for size in (4, message_bytes, 16 * message_bytes)]

    short, _, long = on_ranks(job, group=True)[0]
    if long <= short:
        raise RuntimeError(
            f"a long message took {long:.2e} s, a short one {short:.2e} s: repeat it on a quieter machine"
        )
    return Link(latency_s=short, bytes_per_s=16 * message_bytes / (long - short))


def _one_way_s(size_bytes: int, turns: int) -> float:
    message, first, taken = torch.zeros(size_bytes // 4), dist.get_rank() == 0, []
    for _ in range(turns):
        begun = time.perf_counter()
        for mine in (first, not first):
            if mine:
                dist.send(message, 1 if first else 0)
            else:
                dist.recv(message, 1 if first else 0)
        taken.append((time.perf_counter() - begun) / 2)
    return min(taken)  # what the machine's other work adds is not the link's


def host_seconds(*, turns: int = 200) -> dict[str, float]:
    """Return what issuing one block's operations takes: their time where there is next to nothing to compute."""
    block = TransformerBlock(8, heads=1, hidden=32)
    taken: dict[str, list[float]] = {"F": [], "B": []}
    for _ in range(turns):
        begun = time.perf_counter()
        answer = block(torch.zeros(1, 1, 8, requires_grad=True))
        between = time.perf_counter()
        answer.sum().backward()
        taken["F"].append(between - begun)
        taken["B"].append(time.perf_counter() - between)
    forward, backward = (statistics.median(values) for values in taken.values())
    return {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2}
