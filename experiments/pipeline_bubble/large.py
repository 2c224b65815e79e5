"""Simulate pipelines that no machine here can run, from measured operations: up to 64 stages and 1,024 ranks."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from orders import SCHEDULES, is_single, orders_of
from simulator import Link, Op, ring_all_reduce_s, simulate

BLOCKS = 128  # divides into 64 ranks with two stages each
SEQUENCES = 1024  # a step's, over all ranks: so many micro-batches are shared out
RANKS = (128, 256, 512, 1024)
STAGES = (1, 2, 4, 8, 16, 32, 64)
ALONE = "no pipeline"
BROKEN = 0.2  # a cause that takes more than this share of a step


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of rank and what connects it; the model's blocks are stated in its own terms.

    Attributes:
        says: Where the numbers come from.
        block_s: Seconds of each kind of operation for one block and one micro-batch.
        host_s: Seconds that a host needs to issue it.
        operation_s: Seconds that each operation of a schedule costs besides its blocks.
        runs_ahead: Whether a host issues while the rank computes, so that the longer of both counts; else it is the
            rank that does both, and `block_s` holds what issuing costs.
        parameters: Of one block.
        state_bytes: Of one parameter: weight, gradient, and the optimizer's.
        gradient_bytes: Of one parameter, in the all-reduce.
        activation_bytes: That one block keeps of one micro-batch until its backward.
        message_bytes: Of what goes between two stages.
        memory_bytes: Of one rank.
        pair: Between two stages.
        ring: Between data-parallel neighbours.
    """

    name: str
    says: str
    block_s: dict[str, float]
    host_s: dict[str, float]
    operation_s: float
    runs_ahead: bool
    parameters: float
    state_bytes: float
    gradient_bytes: float
    activation_bytes: float
    message_bytes: float
    memory_bytes: float
    pair: Link
    ring: Link


def cores(measured: dict[str, Any]) -> Machine:
    """Ranks that are cores like this machine's, with 10 Gbit/s between them: nothing but the links is assumed."""
    dim, tokens = measured["dim"], measured["tokens"]
    ethernet = Link(latency_s=30e-6, bytes_per_s=1.25e9)
    return Machine(
        name="cores",
        says="measured operations of one core; 10 Gbit/s, 30 us",
        block_s=measured["block_s"],
        host_s=measured["host_s"],
        operation_s=measured["operation_s"],
        runs_ahead=False,
        parameters=12 * dim**2,
        state_bytes=16,
        gradient_bytes=4,
        activation_bytes=2 * 34 * tokens * dim,  # fp32: twice the bytes of the formula below
        message_bytes=4 * tokens * dim,
        memory_bytes=4e9,
        pair=ethernet,
        ring=ethernet,
    )


def accelerators(measured: dict[str, Any], *, flops_per_s: float = 400e12) -> Machine:
    """Ranks that are accelerators: rate, links and memory are assumed; ratios and what a host costs are measured.

    Activations of a block without recomputation: 34 bytes a token and channel (Korthikanti et al. 2022, arXiv
    2205.05198, equation 1, without the attention scores, which fused kernels do not keep).
    """
    dim, tokens = 4096, 2048
    forward_s = (24 * dim**2 + 2 * tokens * dim) * tokens / flops_per_s  # causal: half of the scores
    ratio = {kind: seconds / measured["block_s"]["F"] for kind, seconds in measured["block_s"].items()}
    return Machine(
        name="accelerators",
        says="assumed: 400 TFLOP/s reached, 80 GB, 50 GB/s and 5 us each way; measured: ratios, host",
        block_s={kind: forward_s * share for kind, share in ratio.items()},
        host_s=measured["host_s"],
        operation_s=measured["operation_s"],
        runs_ahead=True,
        parameters=12 * dim**2,
        state_bytes=16,
        gradient_bytes=2,
        activation_bytes=34 * tokens * dim,
        message_bytes=2 * tokens * dim,
        memory_bytes=80e9,
        pair=Link(latency_s=5e-6, bytes_per_s=50e9),
        ring=Link(latency_s=5e-6, bytes_per_s=50e9),
    )


def point(machine: Machine, name: str, *, ranks: int, stages: int) -> dict[str, Any] | None:
    """Return what a step takes on so many ranks, cut into so many stages, and where it goes; None: cannot be cut so."""
    copies = ranks // stages
    micro_batches, per_rank = SEQUENCES // copies, 1 if is_single(name) else 2
    if micro_batches < 1 or (name == "1F1B" and micro_batches < stages) or (stages == 1 and name != "GPipe"):
        return None
    orders = _orders(name, stages, micro_batches, per_rank)
    blocks = BLOCKS // (stages * per_rank)

    def seconds(op: Op) -> float:
        computing = blocks * machine.block_s[op[0]]
        if not machine.runs_ahead:
            return computing + machine.operation_s
        return max(computing, blocks * machine.host_s[op[0]] + machine.operation_s)

    alone = simulate(orders, seconds)
    sent = simulate(orders, seconds, link=machine.pair, message_bytes=machine.message_bytes)
    parameters = machine.parameters * BLOCKS / stages
    reduce_s = ring_all_reduce_s(machine.gradient_bytes * parameters, ranks=copies, link=machine.ring)
    total = max(end + reduce_s for end in sent.end_s)
    ideal = micro_batches * BLOCKS / stages * (machine.block_s["F"] + machine.block_s["B"])
    busy = sum(alone.busy_s) / stages
    held = max(sent.held) * blocks * machine.activation_bytes
    return {
        "schedule": name if stages > 1 else ALONE,
        "ranks": ranks,
        "stages": stages,
        "copies": copies,
        "micro_batches": micro_batches,
        "step_s": total,
        "efficiency": ideal / total,
        "lost": {
            "splitting and issuing": (busy - ideal) / total,
            "bubble": (alone.span_s - busy) / total,
            "messages": (sent.span_s - alone.span_s) / total,
            "all-reduce": (total - sent.span_s) / total,
        },
        "state_bytes": machine.state_bytes * parameters,
        "activation_bytes": held,
        "fits": machine.state_bytes * parameters + held <= machine.memory_bytes,
    }


def sweep(machines: Iterable[Machine], *, ranks: tuple[int, ...] = RANKS) -> dict[str, list[dict[str, Any]]]:
    """Go through all sizes and return the points of each machine; a step's sequences stay the same."""
    points: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for count, stages, name in product(ranks, STAGES, SCHEDULES):
        for machine in machines:  # innermost: making an order takes as long as running it
            found = point(machine, name, ranks=count, stages=stages)
            if found is not None:
                points[machine.name].append(found)
    return points


@lru_cache(maxsize=1)
def _orders(name: str, ranks: int, micro_batches: int, stages_per_rank: int) -> list[list[Op]]:
    return orders_of(name, ranks=ranks, micro_batches=micro_batches, stages_per_rank=stages_per_rank)


def breaks(points: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return by rank count the best cut that fits, and what is lost there; the first cause over the limit."""
    best, first = {}, None
    for ranks in sorted({found["ranks"] for found in points}):
        here = [found for found in points if found["ranks"] == ranks and found["schedule"] == name]
        fitting = [found for found in here if found["fits"]]
        if not fitting:
            first = first or {"ranks": ranks, "cause": "memory"}
            continue
        top = max(fitting, key=lambda found: found["efficiency"])
        cause = max(top["lost"], key=lambda key: top["lost"][key])
        best[str(ranks)] = {key: top[key] for key in ("stages", "copies", "micro_batches", "efficiency", "lost")}
        if first is None and top["lost"][cause] > BROKEN:
            first = {"ranks": ranks, "cause": cause}
    return {"schedule": name, "best": best, "first": first}


def faster_until_the_host_is_late(machine: Machine) -> float:
    """Return how many times faster the accelerator may get before issuing operations takes as long as doing them."""
    return min(machine.block_s[kind] / machine.host_s[kind] for kind in "FB")


def with_slower_links(machine: Machine) -> Machine:
    """Return the machine with a tenth of the bandwidth."""
    bytes_per_s = machine.ring.bytes_per_s / 10
    return replace(
        machine,
        name=f"{machine.name}, slow links",
        says=f"{machine.says}; with a tenth of the bandwidth",
        pair=replace(machine.pair, bytes_per_s=bytes_per_s),
        ring=replace(machine.ring, bytes_per_s=bytes_per_s),
    )
