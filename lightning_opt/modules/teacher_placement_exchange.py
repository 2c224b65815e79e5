"""How ranks that answer together tell each other their batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_opt.forward import Inputs

_MOST_AXES = 8
_KINDS = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
HEADER = 2 + _MOST_AXES  # kind of number, number of axes, sizes


@dataclass(frozen=True)
class Circle:
    """Ranks that hold one copy of a teacher together, and whose batches it is asked about.

    Attributes:
        group: Their process group.
        ranks: Their numbers in the world, in the order of the group.
        sources: For each batch that they have, the first rank that has it; ranks of one tensor-parallel or pipelined
            student have the same batch.
        batch_of: For each rank of `ranks`, the position in `sources` of its batch.
    """

    group: Any
    ranks: tuple[int, ...]
    sources: tuple[int, ...]
    batch_of: tuple[int, ...]

    @property
    def position(self) -> int:
        """This rank's place in `ranks`."""
        return self.ranks.index(dist.get_rank())

    @property
    def mine(self) -> int:
        """The position of this rank's batch."""
        return self.batch_of[self.position]

    def batches(self, inputs: Inputs) -> list[Inputs]:
        """Return the inputs of each batch of the circle, as they are on their own ranks. Collective.

        Their shapes may differ; what they consist of, and the kinds of numbers, must not.
        """
        if len(self.sources) == 1:
            return [inputs]
        tensors = _tensors(inputs)
        sizes = self._sizes(tensors)
        shared = []
        for number, source in enumerate(self.sources):
            if number == self.mine:
                there = [one.contiguous() for one in tensors]
            else:
                shapes = sizes[self.ranks.index(source)]
                there = [one.new_empty(shape) for one, shape in zip(tensors, shapes, strict=True)]
            for one in there:
                dist.broadcast(as_bytes(one), src=source, group=self.group)
            shared.append(_like(inputs, there))
        return shared

    def _sizes(self, tensors: Sequence[Tensor]) -> list[list[tuple[int, ...]]]:
        """Return the shapes of each rank's tensors."""
        device = tensors[0].device
        mine = torch.stack([header_of(one) for one in tensors]).to(device)
        headers = [torch.empty_like(mine) for _ in self.ranks]
        dist.all_gather(headers, mine, group=self.group)
        return [[_shape(row) for row in rows.tolist()] for rows in headers]


def circle_of(strategy: Any, ranks: int) -> Circle:
    """Return the circle of this rank and its neighbours, `ranks` of them. Collective.

    Args:
        strategy: The trainer's; it says which part of the data this rank sees.
        ranks: How many; they divide the world.
    """
    world, here = dist.get_world_size(), dist.get_rank()
    part = (getattr(strategy, "distributed_sampler_kwargs", None) or {"rank": here})["rank"]
    parts = [torch.empty(1, dtype=torch.long, device=strategy.root_device) for _ in range(world)]
    dist.all_gather(parts, torch.tensor([part], device=strategy.root_device))
    circles = [tuple(range(first, first + ranks)) for first in range(0, world, ranks)]
    # Each rank takes part in making every group.
    groups = [dist.group.WORLD] if ranks == world else [dist.new_group(list(members)) for members in circles]
    number = here // ranks
    seen = [int(parts[rank]) for rank in circles[number]]
    sources = list(dict.fromkeys(seen))
    return Circle(
        group=groups[number],
        ranks=circles[number],
        sources=tuple(circles[number][seen.index(part)] for part in sources),
        batch_of=tuple(sources.index(part) for part in seen),
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as bytes: not every backend sends every kind of number."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def header_of(tensor: Tensor) -> Tensor:
    """Return what a rank must know of a tensor before it can receive it: `(HEADER,)` integers, never all zero."""
    padding = [0] * (_MOST_AXES - tensor.dim())
    return torch.tensor([1 + _KINDS.index(tensor.dtype), tensor.dim(), *tensor.shape, *padding])


def empty_like_header(header: Sequence[int], device: torch.device) -> Tensor:
    """Return memory for the tensor that a header describes."""
    return torch.empty(_shape(header), dtype=_KINDS[header[0] - 1], device=device)


def send(tensor: Tensor, to: int, group: Any, sending: list[Any]) -> None:
    """Start to send a tensor; what must be kept until it has left is added to `sending`."""
    tensor = tensor.contiguous()
    parts = (header_of(tensor).to(tensor.device), as_bytes(tensor))
    sending += [(dist.isend(part, to, group=group), part) for part in parts]


def receive(source: int, group: Any, device: torch.device) -> Tensor:
    """Wait for a tensor that `send` sends."""
    header = torch.empty(HEADER, dtype=torch.long, device=device)
    dist.recv(header, source, group=group)
    tensor = empty_like_header(header.tolist(), device)
    dist.recv(as_bytes(tensor), source, group=group)
    return tensor


def _shape(header: Sequence[int]) -> tuple[int, ...]:
    return tuple(header[2 : 2 + header[1]])


def _tensors(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, tuple | list):
        return list(inputs)
    return [inputs[name] for name in sorted(inputs)]


def _like(inputs: Inputs, tensors: Sequence[Tensor]) -> Inputs:
    if isinstance(inputs, Tensor):
        return tensors[0]
    if isinstance(inputs, tuple | list):
        return tuple(tensors)
    return dict(zip(sorted(inputs), tensors, strict=True))
