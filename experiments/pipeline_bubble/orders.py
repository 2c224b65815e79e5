"""The order in which each rank works, as torch.distributed.pipelining makes it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from simulator import Op
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

SCHEDULES: dict[str, type[PipelineScheduleSingle] | type[PipelineScheduleMulti]] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "interleaved 1F1B": ScheduleInterleaved1F1B,
    "interleaved zero bubble": ScheduleInterleavedZeroBubble,
    "ZBV": ScheduleZBVZeroBubble,
}


def is_single(name: str) -> bool:
    """Say whether a schedule has one stage on each rank."""
    return issubclass(SCHEDULES[name], PipelineScheduleSingle)


def orders_of(name: str, *, ranks: int, micro_batches: int, stages_per_rank: int = 2) -> list[list[Op]]:
    """Return what each rank does, in order, without waits and messages.

    Schedules with several stages a rank hold their order as data. GPipe and 1F1B are code; what it does is written here
    once more, and a test compares it with `asked_of_torch`.
    """
    if is_single(name):
        warm_up = [micro_batches if name == "GPipe" else min(micro_batches, ranks - rank) for rank in range(ranks)]
        return [_one_stage(rank, warm_up[rank], micro_batches) for rank in range(ranks)]
    stage = _stand_in(0, ranks, ranks * stages_per_rank)
    # Messages are added to an order after it is made, which takes longer than all else.
    bare: Any = type("Bare", (SCHEDULES[name],), {"_prepare_schedule_with_comms": lambda *_: None})
    schedule = bare([stage] * stages_per_rank, micro_batches)
    return [
        [
            (str(action.computation_type.value), action.stage_index, action.microbatch_index)
            for action in schedule.pipeline_order[rank]
            if action is not None
        ]
        for rank in range(ranks)
    ]


def _one_stage(stage: int, warm_up: int, micro_batches: int) -> list[Op]:
    """So many forwards, then a backward and a forward in turn, then the backwards that are left."""
    order = [("F", stage, micro) for micro in range(warm_up)]
    for micro in range(micro_batches):
        order.append(("B", stage, micro))
        if warm_up + micro < micro_batches:
            order.append(("F", stage, warm_up + micro))
    return order


def _stand_in(rank: int, ranks: int, stages: int) -> Any:
    """Return what a schedule asks of a stage, without a network or a group."""
    messages = ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops")
    return SimpleNamespace(
        group_rank=rank,
        group_size=ranks,
        submod=None,
        stage_index=rank,
        num_stages=stages,
        is_first=rank == 0,
        is_last=rank == stages - 1,
        has_backward=True,
        perform_reduce_grad=lambda *_: None,
        **{name: lambda _: [] for name in messages},
    )


def asked_of_torch(name: str, *, rank: int, ranks: int, micro_batches: int) -> list[Op]:
    """Run GPipe's or 1F1B's code with a stage that only writes down what is asked of it."""
    stage, asked = _stand_in(rank, ranks, ranks), []

    def note(kind: str) -> Callable[..., None]:
        return lambda micro, *_, **__: asked.append((kind, rank, micro))

    stage.forward_one_chunk, stage.backward_one_chunk = note("F"), note("B")
    schedule: Any = SCHEDULES[name](stage, micro_batches)
    schedule._initialize_stage = lambda *_, **__: None
    schedule._step_microbatches([()] * micro_batches, [{}] * micro_batches)
    return asked
