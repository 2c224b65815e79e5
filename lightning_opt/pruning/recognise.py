"""Tell from the zeros of a weight how it was pruned: singly, N of M, in blocks, or in whole rows and columns.

What a weight's zeros can be worth depends on their arrangement alone, so that is read from the tensor itself and not
from what a config said it should be.
"""

from itertools import product

import torch
from torch import Tensor

NONE, UNSTRUCTURED, LINES = "none", "unstructured", "rows and columns"
LEAST_SPARSITY = 0.01
_LARGEST_M = 32
_MOST_ELEMENTS = 1 << 19
# A kept weight may be zero by accident, so "all" leaves a little room.
_ALMOST_ALL = 0.98
_SIDES = (1, 2, 4, 8, 16, 32, 64)


def kind_of_zeros(weight: Tensor) -> str:
    """Name the arrangement of the zeros of one weight.

    Args:
        weight: `(O, I)` or `(O, I, *kernel)`; N:M and blocks are looked for along `I` first, then along `O`.

    Returns:
        "none" (fewer than 1 % zeros), "rows and columns" (whole slices of the weight are zero and the rest is full),
        "2:4" and the like (the strictest that holds), "blocks 1x4" and the like (the largest that holds; rows along
        `O`), or "unstructured".

    Example:
        >>> kind_of_zeros(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 4.0]]).repeat(8, 2))
        '1:2'
    """
    mask = weight.detach() != 0
    if mask.ndim < 2 or mask.numel() == 0 or float(mask.float().mean()) > 1 - LEAST_SPARSITY:
        return NONE
    planes = mask.flatten(2) if mask.ndim > 2 else mask.unsqueeze(-1)  # (O, I, K)
    if _is_rectangle(planes):
        return LINES
    planes = _part(planes).movedim(-1, 0)  # (K, O, I)
    found = _n_of_m(planes) or _n_of_m(planes.transpose(1, 2))
    if found:
        return "{}:{}".format(*found)
    block = _block(planes)
    return "blocks {}x{}".format(*block) if block else UNSTRUCTURED


def _is_rectangle(planes: Tensor) -> bool:
    """Tell whether what is left is full once the rows and columns that are all zero are taken out."""
    rows, columns = planes.any(dim=2).any(dim=1), planes.any(dim=2).any(dim=0)
    if bool(rows.all()) and bool(columns.all()):
        return False
    inside = planes[rows][:, columns]
    return inside.numel() == 0 or float(inside.float().mean()) >= _ALMOST_ALL


def _part(planes: Tensor) -> Tensor:
    """Take the first rows of a huge weight: half a million elements show every arrangement."""
    per_row = planes[0].numel()
    rows = max(_MOST_ELEMENTS // per_row // _SIDES[-1], 1) * _SIDES[-1]
    return planes[:rows]


def _n_of_m(planes: Tensor) -> tuple[int, int] | None:
    """Find the smallest m for which no group of m along the last axis holds more than n < m, and nearly all hold n."""
    width = planes.shape[-1]
    for m in range(2, _LARGEST_M + 1):
        # Two groups a row at least: rows that were each pruned to one and the same share are no N:M.
        if width % m or width < 2 * m:
            continue
        counts = planes.reshape(-1, m).sum(dim=1)
        most = int(counts.max())
        if 0 < most < m and len(counts) >= 8 and float(counts.float().mean()) >= 0.95 * most:
            return most, m
    return None


def _block(planes: Tensor) -> tuple[int, int] | None:
    """Find the largest block for which nearly every kept weight lies in a block without zeros."""
    kernel, rows, columns = planes.shape
    density = float(planes.float().mean())
    for high, wide in sorted(product(_SIDES, _SIDES), key=lambda sides: -sides[0] * sides[1]):
        size = high * wide
        # By chance alone a block is full with density ** size: near 1 for tiny blocks among few zeros, and no evidence.
        if size == 1 or rows % high or columns % wide or density ** (size - 1) > 0.9:
            continue
        blocks = planes.reshape(kernel, rows // high, high, columns // wide, wide)
        full = blocks.all(dim=4).all(dim=2)
        if float(full.sum()) * size >= _ALMOST_ALL * float(planes.sum()):
            return high, wide
    return None


def is_n_of_m(kind: str) -> bool:
    """Tell whether a kind is one of N:M.

    Example:
        >>> is_n_of_m("2:4"), is_n_of_m("unstructured")
        (True, False)
    """
    return all(part.isdigit() for part in kind.split(":")) and ":" in kind


def share_of_zeros(weight: Tensor) -> float:
    """Return the share of exact zeros, in [0, 1]; 0 for an empty tensor."""
    return 1 - int(torch.count_nonzero(weight.detach())) / weight.numel() if weight.numel() else 0.0
