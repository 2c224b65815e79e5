"""Compare the idle share that was measured with the schedule's theory."""

from collections import defaultdict
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from measure import Done, Trace
from orders import is_single, orders_of
from simulator import Link, Op, Run, fill_drain_bubble, interleaved_bubble, simulate, zero_bubble_bubble

LIMIT = 0.05


def compare(
    name: str, trace: Trace, *, ranks: int, micro_batches: int, link: Link, message_bytes: int
) -> dict[str, Any]:
    """Return the idle share: in theory (of equal stages, and of these: `own`), and of the measured operations.

    `replayed` lets each rank do its operations in the order in which it did them, each as long as it took the
    processor (the median over the steps), on as many processors as there are ranks. The range is that of single steps.
    """
    times = times_of(trace)
    single = [_replay(step, link, message_bytes).idle for step in trace]
    in_theory = theory(name, times, ranks=ranks, micro_batches=micro_batches)
    own = simulate(orders_of(name, ranks=ranks, micro_batches=micro_batches), lambda op: times[op[0]][op[1]]).idle
    run = _replay(_typical(trace), link, message_bytes)
    found = run.idle
    return {
        "schedule": name,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "steps": len(trace),
        "theory": in_theory,
        "own": own,
        "paper": paper(name, times, ranks=ranks, micro_batches=micro_batches),
        "replayed": found,
        "replayed_low": min(single),
        "replayed_high": max(single),
        "off": found / own - 1.0,
        "off_equal_stages": found / in_theory - 1.0,
        "step_ms": 1e3 * run.span_s,
        "spans": [[[*op, begin, end] for op, begin, end in span] for span in run.spans],
        "op_ms": {kind: 1e3 * fmean(by_stage.values()) for kind, by_stage in times.items()},
        "op_ms_by_stage": {
            kind: {str(s): 1e3 * t for s, t in sorted(by_stage.items())} for kind, by_stage in times.items()
        },
    }


def times_of(trace: Trace) -> dict[str, dict[int, float]]:
    """Return the median seconds on the processor of each kind of operation, by stage."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for step in trace:
        for done in (done for rank in step for done in rank):
            found[done.op[0]][done.op[1]].append(done.cpu_s)
    return {kind: {stage: median(values) for stage, values in by.items()} for kind, by in found.items()}


def theory(name: str, times: dict[str, dict[int, float]], *, ranks: int, micro_batches: int) -> float:
    """Return the idle share of the schedule's own order where all stages are equal and messages cost nothing.

    For GPipe and both 1F1B this is the formula of the papers. The zero-bubble orders of torch have none: the first
    stage does its whole backward as "W", and the V shape's share depends on the ratio of the times. Their order is run
    with each kind's mean time over the stages that do the same.
    """
    if not name.endswith(("zero bubble", "ZBV")):
        return paper(name, times, ranks=ranks, micro_batches=micro_batches) or 0.0
    first = min(times["F"])
    means = {kind: fmean(t for stage, t in times[kind].items() if stage != first) for kind in ("F", "I", "W")}

    def seconds(op: Op) -> float:
        kind, stage, _ = op
        return times[kind][stage] if stage == first else means[kind]

    return simulate(orders_of(name, ranks=ranks, micro_batches=micro_batches), seconds).idle


def paper(name: str, times: dict[str, dict[int, float]], *, ranks: int, micro_batches: int) -> float | None:
    """Return the share by the paper's formula; None for ZBV, whose bubble is zero only where F, I and W are equal."""
    if is_single(name):
        return fill_drain_bubble(stages=ranks, micro_batches=micro_batches)
    if name == "interleaved 1F1B":
        return interleaved_bubble(ranks=ranks, micro_batches=micro_batches, stages_per_rank=2)
    if name == "interleaved zero bubble":
        means = {kind: fmean(by.values()) for kind, by in times.items()}
        return zero_bubble_bubble(ranks=ranks, micro_batches=micro_batches, stages_per_rank=2, times=means)
    return None


def _typical(trace: Trace) -> list[list[Done]]:
    """Return one step in which each operation takes its median over all steps."""
    return [
        [replace(same[0], cpu_s=median(done.cpu_s for done in same)) for same in zip(*rank, strict=True)]
        for rank in zip(*trace, strict=True)
    ]


def _replay(step: list[list[Done]], link: Link, message_bytes: int) -> Run:
    taken = {done.op: done.cpu_s for rank in step for done in rank}
    orders = [[done.op for done in rank] for rank in step]
    return simulate(orders, taken.__getitem__, link=link, message_bytes=message_bytes)


def on_the_clock(trace: Trace) -> float:
    """Return the idle share of real time, from the first operation's begin to the last one's end; the median step."""
    return median(_idle(step) for step in trace)


def _idle(step: list[list[Done]]) -> float:
    begin = min(done.begin_s for rank in step for done in rank)
    span = max(done.end_s for rank in step for done in rank) - begin
    return 1.0 - sum(done.end_s - done.begin_s for rank in step for done in rank) / (len(step) * span)
