"""Run a pipeline schedule on paper: each rank does its operations in its own order, as soon as their inputs are there.

Pure Python. Time is in seconds; an operation is (kind, stage, micro-batch), with the kinds of torch's schedules:
"F" forward, "B" whole backward, "I" backward for the input, "W" backward for the weights.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Op = tuple[str, int, int]
Orders = Sequence[Sequence[Op]]


@dataclass(frozen=True)
class Link:
    """What a message between two ranks costs: it arrives `latency_s` after its last byte has left.

    Attributes:
        latency_s: Time that a message of no bytes takes.
        bytes_per_s: How fast one direction of one pair of ranks is; messages go one after another.
    """

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")


@dataclass(frozen=True)
class Run:
    """What happened.

    Attributes:
        spans: Each rank's operations with begin and end.
        busy_s: Each rank's time in operations.
        end_s: When each rank was done.
        held: The most stage inputs that each rank kept for a backward at once, counted in stages.
    """

    spans: list[list[tuple[Op, float, float]]]
    busy_s: list[float]
    end_s: list[float]
    held: list[int]

    @property
    def span_s(self) -> float:
        return max(self.end_s)

    @property
    def idle(self) -> float:
        """Share of all ranks' time in which they did nothing: the bubble."""
        return 1.0 - sum(self.busy_s) / (len(self.busy_s) * self.span_s)


def simulate(
    orders: Orders,
    seconds: Callable[[Op], float],
    *,
    link: Link | None = None,
    message_bytes: float = 0.0,
) -> Run:
    """Run each rank's operations in order; sends overlap with what the sender does next.

    Args:
        orders: For each rank what it does, in its order.
        seconds: How long an operation takes.
        link: Between two ranks; nothing is lost on the way when not given.
        message_bytes: Size of one stage's answer for one micro-batch, and of its gradient.

    Raises:
        ValueError: The orders wait for one another for ever.
    """
    link = link or Link()
    home = {op[1]: rank for rank, order in enumerate(orders) for op in order}
    stages, ranks = max(home) + 1, range(len(orders))
    waiting = [deque(order) for order in orders]
    spans: list[list[tuple[Op, float, float]]] = [[] for _ in ranks]
    free_s, wire_free_s = [0.0] * len(orders), {}
    arrived: dict[tuple[str, int, int], float] = {}
    ready = deque(ranks)
    while ready:
        rank = ready.popleft()
        while waiting[rank]:
            op = waiting[rank][0]
            needs = _input_of(op, stages)
            if needs is not None and needs not in arrived:
                break
            waiting[rank].popleft()
            begin = max(free_s[rank], arrived[needs] if needs is not None else 0.0)
            free_s[rank] = begin + seconds(op)
            spans[rank].append((op, begin, free_s[rank]))
            if (receiver := _receiver(op, stages)) is not None:
                other = home[receiver[1]]
                at = free_s[rank]
                if other != rank:
                    left = max(at, wire_free_s.get((rank, other), 0.0)) + message_bytes / link.bytes_per_s
                    wire_free_s[rank, other] = left
                    at = left + link.latency_s
                arrived[receiver] = at
                ready.append(other)
    if any(waiting):
        raise ValueError(f"the schedule does not go on: rank {[bool(left) for left in waiting].index(True)} waits")
    busy = [sum(end - begin for _, begin, end in span) for span in spans]
    return Run(spans=spans, busy_s=busy, end_s=free_s, held=[_held(span) for span in spans])


def _input_of(op: Op, stages: int) -> Op | None:
    """Return the message that an operation waits for; what its own rank did before is there by its order."""
    kind, stage, micro = op
    if kind == "F":
        return ("F", stage, micro) if stage > 0 else None
    if kind in ("B", "I"):
        return ("B", stage, micro) if stage < stages - 1 else None
    return None


def _receiver(op: Op, stages: int) -> Op | None:
    kind, stage, micro = op
    if kind == "F" and stage < stages - 1:
        return ("F", stage + 1, micro)
    return ("B", stage - 1, micro) if kind in ("B", "I") and stage > 0 else None


def _held(span: Sequence[tuple[Op, float, float]]) -> int:
    held = most = 0
    for (kind, _, _), _, _ in span:
        held += {"F": 1, "B": -1, "W": -1}.get(kind, 0)
        most = max(most, held)
    return most


def fill_drain_bubble(*, stages: int, micro_batches: int) -> float:
    """Return the idle share of GPipe (Huang et al. 2019, arXiv 1811.06965, section 2.3) and of 1F1B with equal stages.

    Example:
        >>> fill_drain_bubble(stages=4, micro_batches=9)
        0.25
    """
    return (stages - 1) / (micro_batches + stages - 1)


def interleaved_bubble(*, ranks: int, micro_batches: int, stages_per_rank: int) -> float:
    """Return the idle share of interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.2)."""
    return (ranks - 1) / (stages_per_rank * micro_batches + ranks - 1)


def zero_bubble_bubble(*, ranks: int, micro_batches: int, stages_per_rank: int, times: Mapping[str, float]) -> float:
    """Return the idle share of ZB-H1 (Qi et al. 2023, arXiv 2401.10241, table 2), the wait divided by stages per rank.

    Args:
        ranks: Ranks of the pipeline.
        micro_batches: Micro-batches of a step.
        stages_per_rank: Stages that each rank holds, as in interleaved 1F1B.
        times: Seconds of "F", "I" and "W" of one stage.
    """
    wait = (ranks - 1) * max(times["F"] + times["I"] - times["W"], 0.0)
    work = micro_batches * stages_per_rank * (times["F"] + times["I"] + times["W"])
    return wait / (work + wait)


def ring_all_reduce_s(size_bytes: float, *, ranks: int, link: Link) -> float:
    """Return the time of a ring's 2 (n - 1) hops (Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69)."""
    hops = 2 * (ranks - 1)
    return hops * (size_bytes / ranks / link.bytes_per_s + link.latency_s)
