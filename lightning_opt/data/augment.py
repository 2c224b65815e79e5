"""Augmentations of whole batches, as pure functions of the batch and its draws.

Each is called with samples `(B, C, L)` or `(B, C, H, W)` and their `Draws`. All are frozen dataclasses, so that their
text says everything about them; it enters the data's fingerprint.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_opt.data.randomness import Draws


class Transform(Protocol):
    """What a data set applies to a batch of samples."""

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Return the changed batch; row i may depend on row i and on its draws only."""
        ...


@dataclass(frozen=True, init=False)
class Compose:
    """Apply transforms one after the other, each with numbers of its own.

    Args:
        transforms: In order of use.
    """

    transforms: tuple[Transform, ...]

    def __init__(self, transforms: Sequence[Transform]) -> None:
        object.__setattr__(self, "transforms", tuple(transforms))

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Apply all to `batch`."""
        for number, transform in enumerate(self.transforms):
            batch = transform(batch, draws.fork(number))
        return batch


@dataclass(frozen=True)
class Normalize:
    """Subtract a mean and divide by a standard deviation; uses no draws.

    Args:
        mean: Of the data.
        std: Of the data, above 0.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std must be above 0, not {self.std}")

    def __call__(self, batch: Tensor, draws: Draws | None = None) -> Tensor:
        """Scale `batch`."""
        return (batch - self.mean) / self.std


@dataclass(frozen=True)
class RandomShift:
    """Move each sample by a whole number of steps along each axis of space or time; what is uncovered becomes 0.

    Args:
        pixels: The farthest move in either direction.
    """

    pixels: int

    def __post_init__(self) -> None:
        _require_at_least("pixels", self.pixels, 1)

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Shift `(B, C, *space)`."""
        axes = batch.ndim - 2
        shifts = (draws.uniform(axes) * (2 * self.pixels + 1)).floor().long() - self.pixels
        for axis in range(axes):
            batch = _shift(batch, shifts[:, axis], dim=axis + 2)
        return batch


def _shift(batch: Tensor, shifts: Tensor, *, dim: int) -> Tensor:
    """Move row b by `shifts[b]` along `dim`."""
    size = batch.shape[dim]
    source = torch.arange(size)[None, :] - shifts[:, None]
    inside = (source >= 0) & (source < size)
    shape = [len(batch)] + [size if axis == dim else 1 for axis in range(1, batch.ndim)]
    index = source.clamp(0, size - 1).view(shape).expand_as(batch)
    return batch.gather(dim, index) * inside.view(shape)


@dataclass(frozen=True)
class RandomFlip:
    """Mirror a sample along its last axis: images left to right, signals in time.

    Args:
        probability: Share of samples that are mirrored.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        _require_share("probability", self.probability)

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Flip some of `(B, C, *space)`."""
        chosen = draws.uniform()[:, 0] < self.probability
        return torch.where(_per_sample(chosen, batch), batch.flip(-1), batch)


@dataclass(frozen=True)
class RandomNoise:
    """Add independent Gaussian noise to every value.

    Args:
        std: Of the noise, in units of the data before normalisation.
    """

    std: float

    def __post_init__(self) -> None:
        _require_positive("std", self.std)

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Add noise to a batch of any shape."""
        return batch + self.std * draws.normal(batch[0].numel()).view_as(batch)


@dataclass(frozen=True)
class RandomScale:
    """Multiply each sample by its own factor, uniform in [1 - amount, 1 + amount].

    Args:
        amount: In (0, 1].
    """

    amount: float

    def __post_init__(self) -> None:
        _require_share("amount", self.amount)

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Scale a batch of any shape."""
        factor = 1.0 + self.amount * (2.0 * draws.uniform()[:, 0] - 1.0)
        return batch * _per_sample(factor, batch)


@dataclass(frozen=True)
class RandomErasing:
    """Set one box of each sample to 0 (Zhong et al. 2017, arXiv 1708.04896, with a box of fixed size).

    Args:
        size: Side of the box as a share of each axis, in (0, 1].
        probability: Share of samples that lose a box.
    """

    size: float = 0.3
    probability: float = 0.5

    def __post_init__(self) -> None:
        _require_share("size", self.size)
        _require_share("probability", self.probability)

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Erase in `(B, C, *space)`."""
        numbers = draws.uniform(batch.ndim - 1)
        erased = _per_sample(numbers[:, 0] < self.probability, batch)
        for axis in range(2, batch.ndim):
            length = batch.shape[axis]
            side = max(1, round(self.size * length))
            start = (numbers[:, axis - 1] * (length - side + 1)).floor()
            place = torch.arange(length)[None, :] - start[:, None]
            shape = [len(batch)] + [length if dim == axis else 1 for dim in range(1, batch.ndim)]
            erased = erased & ((place >= 0) & (place < side)).view(shape)
        return batch.masked_fill(erased, 0.0)


@dataclass(frozen=True)
class RandomAffine:
    """Rotate and scale images about their centre, with bilinear sampling; what is uncovered becomes 0.

    Args:
        degrees: Largest angle in either direction.
        scale: Largest relative change of size, in [0, 1).
    """

    degrees: float = 10.0
    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.degrees < 0:
            raise ValueError(f"degrees must not be negative, not {self.degrees}")
        if not 0 <= self.scale < 1:
            raise ValueError(f"scale must be in [0, 1), not {self.scale}")

    def __call__(self, batch: Tensor, draws: Draws) -> Tensor:
        """Turn and zoom `(B, C, H, W)`."""
        numbers = 2.0 * draws.uniform(2) - 1.0
        angle = numbers[:, 0] * math.radians(self.degrees)
        # The grid says where to read, so the matrix is the inverse of the change that is seen.
        cos, sin = (part / (1.0 + numbers[:, 1] * self.scale) for part in (angle.cos(), angle.sin()))
        ratio = batch.shape[-2] / batch.shape[-1]
        zero = torch.zeros_like(cos)
        rows = [torch.stack([cos, -sin * ratio, zero], dim=1), torch.stack([sin / ratio, cos, zero], dim=1)]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(batch.shape), align_corners=False)
        return F.grid_sample(batch, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _per_sample(values: Tensor, batch: Tensor) -> Tensor:
    """Shape `(B,)` values so that they broadcast over `batch`."""
    return values.view(-1, *[1] * (batch.ndim - 1))


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, not {value}")


def _require_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], not {value}")
