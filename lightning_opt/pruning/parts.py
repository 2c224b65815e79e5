"""Tensors of which each process holds a part: which part it is, and how the parts come together.

FSDP2 and tensor parallelism leave a `DTensor` in each parameter's place, a pipeline leaves whole layers to some of the
processes. Here all of that is one thing: a box of the whole tensor, and whether this process counts it (what several
processes hold is counted by one of them).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Which box of a tensor this process holds.

    Attributes:
        shape: Shape of the whole tensor.
        offsets: Where the box begins in each dimension.
        sizes: Shape of the box; with a 0 if this process holds nothing.
        counts: Whether this process, of all that hold the same box, is the one that counts it.
    """

    shape: torch.Size
    offsets: tuple[int, ...]
    sizes: torch.Size
    counts: bool

    @property
    def box(self) -> tuple[slice, ...]:
        """The box as an index into the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))

    def turned(self) -> "Place":
        """Return the place in the tensor whose first two dimensions have changed places."""
        order = [1, 0, *range(2, len(self.shape))]
        offsets = tuple(self.offsets[dim] for dim in order)
        return Place(_picked(self.shape, order), offsets, _picked(self.sizes, order), self.counts)


def place_of(tensor: Tensor, *, counts: bool = True) -> Place:
    """Return which part of a `DTensor` this process holds; of a plain tensor it holds everything.

    Args:
        tensor: The tensor.
        counts: Whether this process counts a plain tensor.
    """
    if not is_sharded(tensor):
        return Place(tensor.shape, (0,) * tensor.dim(), tensor.shape, counts)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)
    coordinate = sharded.device_mesh.get_coordinate()
    kinds = zip(coordinate or (), sharded.placements, strict=False)
    first = coordinate is not None and all(place == 0 for place, kind in kinds if kind.is_replicate())
    return Place(tensor.shape, tuple(offsets), torch.Size(sizes), first)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`."""
    return hasattr(tensor, "_local_tensor")


def local_of(tensor: Tensor) -> Tensor:
    """Return this process's part of a `DTensor`, in the same memory; a plain tensor itself."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


class Layout:
    """The places of a model's tensors; the same names in the same order on all processes.

    Args:
        places: By name.
        dtypes: Of the tensors.
        held: Names of those of which this process has a part, be it an empty one.
    """

    def __init__(self, places: Mapping[str, Place], dtypes: Mapping[str, torch.dtype], held: Collection[str]) -> None:
        self.places, self.dtypes, self.held = dict(places), dict(dtypes), frozenset(held)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, order: Sequence[str] = ()) -> "Layout":
        """Find the places out; all processes must call it.

        Args:
            tensors: What this process holds, by name.
            order: The names of the whole model in their order, where a process does not hold all of them.
        """
        mine = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        known = {name: facts for rank in reversed(ranks) for name, facts in rank.items()}
        first = {name: rank for rank in reversed(range(len(ranks))) for name in ranks[rank]}
        seen = dict.fromkeys(name for rank in ranks for name in rank)
        names = [name for name in order if name in known] or list(seen)
        places = {}
        for name in names:
            shape = torch.Size(known[name][0])
            held = tensors.get(name)
            absent = Place(shape, (0,) * len(shape), torch.Size([0, *shape[1:]]), False)
            places[name] = absent if held is None else place_of(held, counts=dist.get_rank() == first[name])
        return cls(places, {name: getattr(torch, known[name][1]) for name in names}, held=tensors.keys())

    def __getitem__(self, name: str) -> Place:
        return self.places[name]

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def whole(self, name: str, part: Tensor | None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Put a tensor together from the parts, on all processes; all must call it.

        Args:
            name: Whose place it has; a mask or a gradient has its weight's.
            part: This process's part; None where it has none.
            dtype: Of the parts; the weight's when not given.
        """
        return together(self.places[name], part, dtype=dtype or self.dtypes[name])

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return a copy of this process's part of a tensor that has the weight's shape."""
        return whole[self.places[name].box].clone()


def together(place: Place, part: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """Put a tensor together from the processes' parts, bit for bit; all processes must call it."""
    whole = _filled(place, part, dtype)
    dist.all_reduce(as_bytes(whole))
    return whole if part is None else whole.to(part.device)


def together_on(rank: int, place: Place, part: Tensor, *, dtype: torch.dtype) -> Tensor | None:
    """Do the same on one process; the others get None."""
    whole = _filled(place, part, dtype)
    dist.reduce(as_bytes(whole), dst=rank)
    return whole.to(part.device) if dist.get_rank() == rank else None


def _filled(place: Place, part: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return zeros of the whole shape, with this process's part in its place if it is the one that counts."""
    whole = torch.zeros(place.shape, dtype=dtype, device=meeting_device())
    if place.counts and part is not None:
        whole[place.box] = part.detach().to(whole.device)
    return whole


def as_bytes(tensor: Tensor) -> Tensor:
    """View a contiguous tensor as bytes: where all but one process have zeros, their sum is exact for any type."""
    return tensor.view(-1).view(torch.uint8)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over all processes, on the tensor's device; all must call it."""
    moved = tensor.to(meeting_device(), copy=True)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def meeting_device() -> torch.device:
    """Return the device whose tensors the processes can exchange."""
    if "nccl" not in dist.get_backend():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _picked(sizes: torch.Size, order: Sequence[int]) -> torch.Size:
    return torch.Size([sizes[dim] for dim in order])
