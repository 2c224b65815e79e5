"""What the processes of a job do as one: gather, agree, and fail alike.

Objects go from one live process to another and never into a file. Without a process group there is one process.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_opt.errors import LightningOptError

T = TypeVar("T")


def rank() -> int:
    """Return the number of this process in the job."""
    return dist.get_rank() if _is_distributed() else 0


def processes() -> int:
    """Return how many processes the job has."""
    return dist.get_world_size() if _is_distributed() else 1


def gather(value: Any) -> list[Any]:
    """Return what every process passed in, by rank; all processes must call it."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """Return what the first process passed in; all processes must call it."""
    if not _is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agree(work: Callable[[], T]) -> T:
    """Do something in every process; if it fails in one, every process raises.

    A process that went on alone would wait for the others until its group's timeout.

    Raises:
        Exception: Of the failing process; in the others one of the same class of ours that names its rank.
    """
    try:
        result, failure = work(), None
    except Exception as error:
        result, failure = None, error
    said = gather(None if failure is None else (_class_of(failure), str(failure)))
    if failure is not None:
        raise failure
    for number, found in enumerate(said):
        if found is not None:
            kind, text = found
            raise kind(f"rank {number}: {text}")
    return result  # type: ignore[return-value]  # None only after a failure


def _class_of(error: Exception) -> type[Exception]:
    return type(error) if isinstance(error, LightningOptError) else RuntimeError


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
