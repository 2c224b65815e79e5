"""How many processes share a batch and how many share a layer, and the groups that follow from it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_opt.errors import ConfigError

DATA, TENSOR = "data_parallel", "tensor_parallel"


@dataclass(frozen=True)
class Sizes:
    """How the processes of a job are arranged: `data * tensor` of them.

    Args:
        data: Processes that see different samples.
        tensor: Processes that share each layer.
    """

    data: int
    tensor: int


def sizes_of(processes: int, *, data: int | None, tensor: int | None) -> Sizes:
    """Return the sizes for a number of processes; a size that is not given is what is left.

    Raises:
        ConfigError: The sizes do not multiply to the number of processes.

    Example:
        >>> sizes_of(8, data=None, tensor=2)
        Sizes(data=4, tensor=2)
    """
    given = {"data_parallel_size": data, "tensor_parallel_size": tensor}
    for name, size in given.items():
        if size is not None and size < 1:
            raise ConfigError(f"strategy.{name}={size}: give 1 or more, or null for what is left of all processes")
        if size is not None and processes % size:
            raise ConfigError(
                f"strategy.{name}={size} does not divide the {processes} processes of trainer.devices times "
                f"trainer.num_nodes; choose one of {', '.join(map(str, _divisors(processes)))}"
            )
    if data is None:
        data = processes // (tensor or 1)
    if tensor is None:
        tensor = processes // data
    if data * tensor != processes:
        raise ConfigError(
            f"strategy.data_parallel_size={data} times strategy.tensor_parallel_size={tensor} is {data * tensor}, but "
            f"trainer.devices times trainer.num_nodes is {processes}; set trainer.devices={data * tensor} or leave one "
            "of the sizes out"
        )
    return Sizes(data=data, tensor=tensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's own piece of a tensor, sharing its memory; a plain tensor is its own piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor], *, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite tensors in place with those of the group's first rank, wherever they lie.

    Processes that built a model from different random states would otherwise each keep a piece of another model.
    """
    source = 0 if group is None else dist.get_global_rank(group, 0)
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            continue
        there = tensor.detach().to(device).contiguous()
        dist.broadcast(there, src=source, group=group)
        if there.data_ptr() != tensor.data_ptr():
            tensor.copy_(there)


def copy_random_state(*, device: torch.device, group: dist.ProcessGroup) -> None:
    """Give all ranks of a group the random state of its first one: dropout then drops the same values on each."""
    state = torch.get_rng_state().to(device)
    dist.broadcast(state, src=dist.get_global_rank(group, 0), group=group)
    torch.set_rng_state(state.cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        dist.broadcast(state, src=dist.get_global_rank(group, 0), group=group)
        torch.cuda.set_rng_state(state.cpu(), device)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
