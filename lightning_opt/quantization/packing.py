"""Keep integers of few bits in few bytes: two of 3 or 4 bits, or four of 2 bits, in each byte."""

import torch
from torch import Tensor

from lightning_opt.quantization.grid import Grid


def packed_bits(grid: Grid) -> int:
    """Return how many bits one integer of `grid` takes in memory: 2, 4 or 8."""
    if grid.is_float or grid.bits > 4:
        return 8
    return 4 if grid.bits > 2 else 2


def pack(q: Tensor, grid: Grid) -> Tensor:
    """Lay the integers of each row side by side in bytes, the first in the lowest bits.

    Args:
        q: int8 or uint8, `(rows, ...)`.
        grid: What the integers are of.

    Returns:
        `q` itself where one integer takes a byte, otherwise uint8 `(rows, bytes)`; a row ends with zeros.
    """
    bits = packed_bits(grid)
    if bits == 8:
        return q
    many = 8 // bits
    rows = (q.reshape(q.shape[0], -1).to(torch.int16) + _offset(grid)).to(torch.uint8)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % many))
    parts = rows.reshape(rows.shape[0], -1, many)
    packed = parts[..., 0].clone()
    for place in range(1, many):
        packed |= parts[..., place] << (bits * place)
    return packed


def unpack(packed: Tensor, grid: Grid, row_shape: tuple[int, ...]) -> Tensor:
    """Undo `pack`.

    Args:
        packed: What `pack` returned, or some of its rows.
        grid: What the integers are of.
        row_shape: The shape of one row.

    Returns:
        int8 or uint8 `(rows, *row_shape)`.
    """
    bits = packed_bits(grid)
    if bits == 8:
        return packed
    mask, many = 2**bits - 1, 8 // bits
    parts = [(packed >> (bits * place)) & mask for place in range(many)]
    count = 1
    for size in row_shape:
        count *= size
    rows = torch.stack(parts, dim=-1).flatten(1)[:, :count]
    if grid.signed:
        rows = rows.to(torch.int8) - _offset(grid)
    return rows.reshape(packed.shape[0], *row_shape)


def _offset(grid: Grid) -> int:
    return 2 ** (packed_bits(grid) - 1) if grid.signed else 0
