"""Which part of a logical tensor this process holds, and how to make its part from a whole one."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from lightning_opt.checkpointing import together
from lightning_opt.errors import ConfigError

Sizes = tuple[int, ...]
Read = Callable[[Sizes, Sizes], Tensor]
"""Returns the box of a logical tensor that begins at some offsets and has some sizes."""


@dataclass(frozen=True)
class Part:
    """A process's piece of a logical tensor.

    Args:
        local: The piece.
        offsets: Where in the logical tensor it begins.
        shape: Of the logical tensor.
    """

    local: Tensor
    offsets: Sizes
    shape: Sizes


@dataclass(frozen=True)
class _Run:
    """Consecutive indices along one dimension: where they are in the logical tensor, and where in the local one."""

    start: int
    at: int
    length: int


def part_of(tensor: Tensor, *, replica: int | None = None) -> Part | None:
    """Return the piece of a tensor that this process has to write, or None if another process writes it.

    Args:
        tensor: A plain one (all of it is one piece) or a DTensor.
        replica: Which of the processes with the same plain tensors this is: the first one writes them. None: the rank.

    Raises:
        ConfigError: The piece is none: what the process holds lies in several places of the logical tensor (see
            `parts_of`), or the values of several processes would have to be added up.
    """
    parts = parts_of(tensor, replica=replica)
    if len(parts) > 1:
        raise ConfigError(f"a tensor of shape {tuple(tensor.shape)} is held in {len(parts)} places: save parts_of it")
    return parts[0] if parts else None


def parts_of(tensor: Tensor, *, replica: int | None = None) -> list[Part]:
    """Return the pieces of a tensor that this process has to write; see `part_of`."""
    if not isinstance(tensor, DTensor):
        first = (together.rank() if replica is None else replica) == 0
        return [Part(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape))] if first else []
    if not _writes(tensor):
        return []
    local, shape = local_of(tensor), tuple(tensor.shape)
    boxes = _boxes(_runs(tensor))
    return [Part(local[_slices(box)], tuple(run.start for run in box), shape) for box in boxes]


def local_of(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, without a copy and without a gradient."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def like(live: Tensor, read: Read, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor laid out over processes like `live`, with the values of a logical tensor of its shape.

    Only what this process holds is read.
    """
    if not isinstance(live, DTensor):
        return read((0,) * live.ndim, tuple(live.shape))
    runs = _runs(live)
    boxes = list(_boxes(runs))
    if len(boxes) == 1:
        local = read(tuple(run.start for run in boxes[0]), tuple(run.length for run in boxes[0]))
    else:
        sizes = [sum(run.length for run in along) for along in runs]
        local = torch.empty(sizes, dtype=dtype or live.dtype)
        for box in boxes:
            offsets, lengths = tuple(run.start for run in box), tuple(run.length for run in box)
            local[_slices(box)] = read(offsets, lengths)
    local = local.to(live.device)
    return DTensor.from_local(
        local, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
    )


def _writes(tensor: DTensor) -> bool:
    """Whether this process has coordinate 0 in every dimension of the mesh along which the tensor is repeated."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    if any(placement.is_partial() for placement in tensor.placements):
        raise ConfigError(
            f"a tensor of shape {tuple(tensor.shape)} is a sum over processes: it can't be saved as it is"
        )
    repeated = [where for where, one in zip(coordinate, tensor.placements, strict=True) if one.is_replicate()]
    return not any(repeated)


def _runs(tensor: DTensor) -> list[list[_Run]]:
    """Return for each dimension which indices of the logical tensor this process holds, as consecutive runs."""
    indices = [torch.arange(size) for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return [[_Run(0, 0, 0)] for _ in tensor.shape]
    for where, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            indices[placement.dim] = _shard(indices[placement.dim], placement, chunks=size)[where]
    held = tuple(len(one) for one in indices)
    if held != tuple(local_of(tensor).shape):
        raise ConfigError(
            f"a tensor of shape {tuple(tensor.shape)} laid out as {tensor.placements} should leave {held} on this rank "
            f"and leaves {tuple(local_of(tensor).shape)}: it is not an even split"
        )
    return [_consecutive(one) for one in indices]


def _shard(indices: Tensor, placement: Placement, *, chunks: int) -> list[Tensor]:
    if isinstance(placement, _StridedShard):  # another dimension of the mesh has cut it first, and cuts it once more
        pieces = [_chunk(piece, chunks) for piece in _chunk(indices, int(placement.split_factor))]
        return [torch.cat([piece[number] for piece in pieces]) for number in range(chunks)]
    return _chunk(indices, chunks)


def _chunk(indices: Tensor, chunks: int) -> list[Tensor]:
    size = -(-len(indices) // chunks) or 1
    return [indices[number * size : (number + 1) * size] for number in range(chunks)]


def _consecutive(indices: Tensor) -> list[_Run]:
    if not len(indices):
        return [_Run(0, 0, 0)]
    breaks = (indices.diff() != 1).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(indices)]
    return [_Run(int(indices[first]), first, last - first) for first, last in itertools.pairwise(edges)]


def _boxes(runs: Sequence[Sequence[_Run]]) -> Iterator[tuple[_Run, ...]]:
    return itertools.product(*runs)


def _slices(box: Sequence[_Run]) -> tuple[slice, ...]:
    return tuple(slice(run.at, run.at + run.length) for run in box)
