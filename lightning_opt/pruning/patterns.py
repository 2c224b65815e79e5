"""Which weights go together: single ones, n of m, blocks, rows, columns.

A pattern reads a weight as `(outputs, inputs, *kernel)`, the shape of linear and convolution layers. N:M groups and
blocks run along the inputs of one kernel position, which is how sparse kernels store convolutions. Modules that keep
their inputs first (transposed convolutions, Hugging Face's `Conv1D`) are found by `inputs_first`, and `select` turns
their weights. An embedding `(vocabulary, width)` is read as it is: its rows are the words.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_opt.pruning.parts import Place


class Pattern(ABC):
    """The units in which weights are kept or removed.

    Attributes:
        oriented: The pattern tells outputs from inputs; without it, weights that keep their inputs first aren't turned.
    """

    oriented: ClassVar[bool] = True

    @property
    def density(self) -> float | None:
        """The share of weights that stays, where the pattern alone decides it; else None."""
        return None

    @abstractmethod
    def check(self, name: str, shape: torch.Size) -> None:
        """Refuse a weight that the pattern does not fit.

        Raises:
            ValueError: Naming the weight, its shape and what to change.
        """

    @abstractmethod
    def unit_size(self, shape: torch.Size) -> int:
        """Return how many weights one unit of a weight of `shape` has."""

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """Sum scores of a weight's shape to `(units,)`, in the order of the weight's own elements."""

    @abstractmethod
    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """Spread `(units,)` values (such as a bool mask) over a weight of `shape`; the inverse of `pool`."""

    def units_at(self, place: Place) -> Place | None:
        """Return which of all units are those of a part of a weight; None if the part cuts through some, or may.

        The scores of such a part are pooled, and its mask expanded, like those of a weight of the part's shape.
        """
        return None

    def keep(self, units: Tensor, fraction: float) -> Tensor:
        """Return the bool `(units,)` to keep at `fraction` of the way, for a pattern that fixes its density."""
        raise NotImplementedError(f"{type(self).__name__} leaves the density to an allocation")


@dataclass(frozen=True)
class Element(Pattern):
    """Every weight by itself (unstructured)."""

    oriented: ClassVar[bool] = False

    def check(self, name: str, shape: torch.Size) -> None:
        if shape.numel() == 0 or len(shape) == 0:
            raise ValueError(f"weights of {name} {tuple(shape)}: there is nothing to choose from; exclude them")

    def unit_size(self, shape: torch.Size) -> int:
        return 1

    def pool(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.reshape(shape)

    def units_at(self, place: Place) -> Place | None:
        return place


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` weights that are not zero in each `m` that follow each other along the inputs.

    2:4 is what sparse tensor cores take (Mishra et al. 2021, arXiv 2104.08378). On the way there, at `fraction` f of
    the schedule, each group loses `(m - n) * f` weights, rounded: m:m, then m-1:m and so on until n:m.

    Args:
        n: Weights that stay in each group.
        m: Size of a group.

    Raises:
        ValueError: Not 0 < n < m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"n and m must be 0 < n < m, not {self.n}:{self.m}")

    @property
    def density(self) -> float:
        return self.n / self.m

    def check(self, name: str, shape: torch.Size) -> None:
        _check_matrix(name, shape, f"N:M {self.n}:{self.m}")
        if shape[1] % self.m:
            raise ValueError(
                f"weights of {name} {tuple(shape)}: N:M {self.n}:{self.m} needs the input dimension to be divisible by "
                f"{self.m}, it is {shape[1]}; exclude them or choose another m"
            )

    def unit_size(self, shape: torch.Size) -> int:
        return 1

    def pool(self, scores: Tensor) -> Tensor:
        return scores.movedim(1, -1).reshape(-1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def units_at(self, place: Place) -> Place | None:
        return place if _split(place, {1: self.m}) else None

    def per_group(self, fraction: float) -> int:
        """Return how many weights stay in each group at `fraction` of the way.

        >>> [NM(2, 4).per_group(fraction) for fraction in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [4, 3, 3, 2, 2]
        """
        return self.m - int((self.m - self.n) * fraction + 0.5)

    def keep(self, units: Tensor, fraction: float) -> Tensor:
        """Keep the best of each group; of equal ones the first."""
        groups = units.reshape(-1, self.m)
        count = self.per_group(fraction)
        better = torch.zeros(groups.shape, dtype=torch.int16, device=units.device)
        for place in range(self.m):
            other = groups[:, place : place + 1]
            better += other > groups
            better[:, place + 1 :] += other == groups[:, place + 1 :]
        return (better < count).reshape(-1)


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `rows` outputs by `cols` inputs at one kernel position, such as 1x4, 16x1 or 32x32.

    Args:
        rows: Outputs in a block.
        cols: Inputs in a block.

    Raises:
        ValueError: A side is below 1, or both are 1.
    """

    rows: int = 1
    cols: int = 4

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.rows * self.cols == 1:
            raise ValueError(f"rows and cols must be at least 1, and not both 1; got {self.rows}x{self.cols}")

    def check(self, name: str, shape: torch.Size) -> None:
        what = f"blocks of {self.rows}x{self.cols}"
        _check_matrix(name, shape, what)
        for size, side, axis in ((shape[0], self.rows, "output"), (shape[1], self.cols, "input")):
            if size % side:
                raise ValueError(
                    f"weights of {name} {tuple(shape)}: {what} need the {axis} dimension to be divisible by {side}, "
                    f"it is {size}; exclude them or choose another block"
                )

    def unit_size(self, shape: torch.Size) -> int:
        return self.rows * self.cols

    def pool(self, scores: Tensor) -> Tensor:
        outputs, inputs = scores.shape[:2]
        blocks = scores.reshape(outputs // self.rows, self.rows, inputs // self.cols, self.cols, -1)
        return blocks.sum(dim=(1, 3)).reshape(-1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        down, across = shape[0] // self.rows, shape[1] // self.cols
        blocks = kept.reshape(down, 1, across, 1, -1)
        return blocks.expand(down, self.rows, across, self.cols, blocks.shape[-1]).reshape(shape)

    def units_at(self, place: Place) -> Place | None:
        return _split(place, {0: self.rows, 1: self.cols})


@dataclass(frozen=True)
class Rows(Pattern):
    """Whole outputs: the rows of a linear layer, the filters of a convolution, the words of an embedding.

    The zeros stay in the dense tensor; to remove the rows as well, see structured pruning.
    """

    def check(self, name: str, shape: torch.Size) -> None:
        _check_matrix(name, shape, "whole rows")

    def unit_size(self, shape: torch.Size) -> int:
        return shape.numel() // shape[0]

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).sum(dim=1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.reshape(-1, *(1 for _ in shape[1:])).expand(shape).contiguous()

    def units_at(self, place: Place) -> Place | None:
        return _split(place, {dim: size for dim, size in enumerate(place.shape) if dim != 0})


@dataclass(frozen=True)
class Columns(Pattern):
    """Whole inputs: the columns of a linear layer, the input channels of a convolution's filters."""

    def check(self, name: str, shape: torch.Size) -> None:
        _check_matrix(name, shape, "whole columns")

    def unit_size(self, shape: torch.Size) -> int:
        return shape.numel() // shape[1]

    def pool(self, scores: Tensor) -> Tensor:
        return scores.transpose(0, 1).flatten(1).sum(dim=1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.reshape(1, -1, *(1 for _ in shape[2:])).expand(shape).contiguous()

    def units_at(self, place: Place) -> Place | None:
        return _split(place, {dim: size for dim, size in enumerate(place.shape) if dim != 1})


@singledispatch
def has_inputs_first(module: nn.Module) -> bool:
    """Say whether the weight of `module` is `(inputs, outputs, ...)`; register your own types with `.register`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # Hugging Face's, without importing it


@has_inputs_first.register
def _(module: nn.modules.conv._ConvTransposeNd) -> bool:
    return True


def inputs_first(model: nn.Module) -> frozenset[str]:
    """Return the full names of the weights of `model` that keep their inputs in dimension 0."""
    turned = (name for name, module in model.named_modules() if has_inputs_first(module))
    return frozenset(f"{name}.weight" if name else "weight" for name in turned)


def _split(place: Place, sides: Mapping[int, int]) -> Place | None:
    """Return the place in the grid of boxes that are `sides[dim]` long; None if the part's border cuts through one."""
    side = [sides.get(dim, 1) for dim in range(len(place.shape))]
    if 0 in place.sizes:
        whole = [extent // step for extent, step in zip(place.shape, side, strict=True)]
        return Place(torch.Size(whole), (0,) * len(whole), torch.Size([0, *whole[1:]]), False)
    numbers = zip(place.shape, place.offsets, place.sizes, side, strict=True)
    parts = [
        (extent // step, start // step, size // step, start % step or size % step)
        for extent, start, size, step in numbers
    ]
    if any(rest for *_, rest in parts):
        return None
    shape, offsets, sizes, _ = zip(*parts, strict=True)
    return Place(torch.Size(shape), offsets, torch.Size(sizes), place.counts)


def _check_matrix(name: str, shape: torch.Size, what: str) -> None:
    if len(shape) < 2 or shape.numel() == 0:
        raise ValueError(
            f"weights of {name} {tuple(shape)}: {what} need outputs and inputs, at least two dimensions; exclude them "
            "or choose Element()"
        )
