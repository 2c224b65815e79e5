"""A layer's weights as rows of numbers that must come to lie on a lattice: what rounding methods work on."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lattice:
    """Where the weights of a layer may lie: `(level - zero_point) * scale`, levels from `qmin` to `qmax`.

    Weights are `(G, O, I)`: groups of a convolution, outputs of each, inputs of each output. Columns share a scale in
    runs of `width`.

    Attributes:
        scale: `(G, O, K)` float32, with `K * width >= I`.
        zero_point: `(G, O, K)` float32.
        qmin: Least level.
        qmax: Greatest level.
        width: Columns of a run.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    width: int

    def columns(self, columns: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of each of the weights, `(G, O, columns)`."""
        runs = torch.arange(columns, device=self.scale.device) // self.width
        return self.scale[..., runs], self.zero_point[..., runs]

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the value on the lattice that is next to each weight, `(G, O, I)`."""
        return _on_lattice(weight, *self.columns(weight.shape[-1]), self.qmin, self.qmax)

    def nearest_in(self, values: Tensor, run: Tensor | int) -> Tensor:
        """Return what is next to one column's weights, `(G, O)`.

        Args:
            values: The column, `(G, O)`.
            run: The column's run: a number, or one for each group of the convolution, `(G,)`.
        """
        if isinstance(run, int):
            scale, zero_point = self.scale[..., run], self.zero_point[..., run]
        else:
            rows = torch.arange(len(run), device=run.device)
            scale, zero_point = self.scale[rows, :, run], self.zero_point[rows, :, run]
        return _on_lattice(values, scale, zero_point, self.qmin, self.qmax)

    def with_run(self, run: int, scale: Tensor, zero_point: Tensor) -> "Lattice":
        """Return the lattice with another scale and zero point, `(G, O)` each, in one run of columns."""
        scales, zero_points = self.scale.clone(), self.zero_point.clone()
        scales[..., run], zero_points[..., run] = scale, zero_point
        return replace(self, scale=scales, zero_point=zero_points)


def _on_lattice(values: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    levels = torch.clamp(torch.round(values * scale.reciprocal()) + zero_point, qmin, qmax)
    return (levels - zero_point) * scale


def to_rows(weight: Tensor, *, output_dim: int = 0, groups: int = 1) -> Tensor:
    """View a layer's weight as `(G, O, I)`.

    Args:
        weight: `(out, in / groups, *kernel)`, or with `output_dim=1` `(in, out)`.
        output_dim: Its dimension that runs over outputs.
        groups: Groups of a convolution.
    """
    rows = weight.movedim(output_dim, 0).flatten(1)
    return rows.unflatten(0, (groups, -1))


def from_rows(rows: Tensor, like: Tensor, *, output_dim: int = 0) -> Tensor:
    """Undo `to_rows`: return `(G, O, I)` in the shape, memory order and dtype of `like`."""
    shape = like.movedim(output_dim, 0).shape
    assert rows.numel() == math.prod(shape)
    return rows.reshape(shape).movedim(0, output_dim).to(like.dtype).contiguous()
