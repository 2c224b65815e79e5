"""Quantization as operators of their own, so that an exporter sees one node where torch would show it ten.

Inside `exporting()` the functions of `functional` call these instead of plain aten operators; values are the same, bit
for bit. A translation table for an engine's format needs these three names and nothing else.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor


class Switch:
    """A flag of the process that `with switch.on():` sets; unlike a context variable, compiled code can read it."""

    def __init__(self) -> None:
        self.is_on = False
        self._entered = 0

    @contextmanager
    def on(self) -> Iterator[None]:
        """Set the flag inside; it is off once everyone who set it has left, in whichever order."""
        self._entered += 1
        self.is_on = True
        try:
            yield
        finally:
            self._entered -= 1
            self.is_on = self._entered > 0


EXPORTING = Switch()


def exporting() -> AbstractContextManager[None]:
    """Make quantization show up as `lightning_opt::` operators in a graph that is traced inside."""
    return EXPORTING.on()


def is_exporting() -> bool:
    """Return whether `exporting()` is entered."""
    return EXPORTING.is_on


def along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Shape one value per index of `axis` (or one value, for None) so that it broadcasts against `x`."""
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def widen(x: Tensor) -> Tensor:
    """Return `x` in at least float32, where rounding to a grid is exact."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@torch.library.custom_op("lightning_opt::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    """Round `x` to an integer grid and return the values that the integers stand for, in the dtype of `x`.

    Args:
        x: Any shape.
        scale: `(1,)`, or `(n,)` with `axis`.
        zero_point: int32, shaped like `scale`.
        axis: The axis of `x` that the scales run along; None for one scale.
        qmin: Smallest integer.
        qmax: Largest integer.
    """
    scale, zero_point = along(scale, x, axis), along(zero_point, x, axis)
    rounded = (widen(x) * scale.reciprocal()).round_()
    low, high = qmin - zero_point, qmax - zero_point
    return rounded.clamp_(low.to(rounded.dtype), high.to(rounded.dtype)).mul_(scale).to(x.dtype)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_opt::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Return the float32 values `(q - zero_point) * scale` of integers (or 8-bit floats).

    Args:
        q: int8, uint8 or float8, any shape.
        scale: `(n,)`.
        zero_point: int32 `(n,)`.
        axis: As of the grid.
        group_size: As of the grid.
    """
    return dequantize_plain(q, scale, zero_point, axis, group_size)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@torch.library.custom_op("lightning_opt::dynamic_quantize_dequantize", mutates_args=())
def dynamic_quantize_dequantize(x: Tensor, symmetric: bool, qmin: int, qmax: int) -> Tensor:
    """Round `x` to the grid of its own range: of one scale, found from its smallest and largest value.

    Args:
        x: Any shape.
        symmetric: The range is the same on both sides of 0.
        qmin: Smallest integer.
        qmax: Largest integer.
    """
    low, high = torch.aminmax(widen(x))
    scale, zero_point = range_to_scale(low.reshape(1), high.reshape(1), symmetric=symmetric, qmin=qmin, qmax=qmax)
    return quantize_dequantize(x, scale, zero_point, None, qmin, qmax)


@dynamic_quantize_dequantize.register_fake
def _(x: Tensor, symmetric: bool, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


def dequantize_plain(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Do what `dequantize` does, with aten operators."""
    if group_size is not None and axis is not None:
        return ungroup(
            _shifted(group(q.to(scale.dtype), axis, group_size), scale, zero_point, group_shape(q, axis, group_size)),
            q,
            axis,
        )
    wide = q.to(scale.dtype)
    if q.dtype.is_floating_point:
        return wide.mul_(along(scale, q, axis))
    return wide.sub_(along(zero_point, q, axis)).mul_(along(scale, q, axis))


def _shifted(wide: Tensor, scale: Tensor, zero_point: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (wide - zero_point.reshape(shape)) * scale.reshape(shape)


def group_shape(x: Tensor, axis: int, group_size: int) -> tuple[int, int, int]:
    """Return the shape `(channels, groups, 1)` of the scales of a grouped tensor."""
    along_axis = x.shape[axis]
    rest = x.numel() // max(along_axis, 1)
    return along_axis, -(-rest // group_size), 1


def group(x: Tensor, axis: int, group_size: int) -> Tensor:
    """Lay a tensor out as `(channels, groups, group_size)`; the last group is filled up with zeros."""
    rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    missing = -rows.shape[1] % group_size
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.reshape(rows.shape[0], -1, group_size)


def ungroup(grouped: Tensor, like: Tensor, axis: int) -> Tensor:
    """Undo `group` for a tensor shaped like `like`."""
    moved = like.movedim(axis, 0).shape
    rest = like.numel() // max(like.shape[axis], 1)
    return grouped.reshape(grouped.shape[0], -1)[:, :rest].reshape(moved).movedim(0, axis)


def range_to_scale(low: Tensor, high: Tensor, *, symmetric: bool, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Return the scale and the int32 zero point of the integer grid that just covers `low` to `high` and 0.

    A range of (nearly) nothing counts as one of 1: such a tensor is all zeros, and whatever is derived from the scale
    stays of ordinary size.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        reach, steps = torch.maximum(-low, high), (qmax - qmin) / 2
    else:
        reach, steps = high - low, float(qmax - qmin)
    scale = torch.where(reach > SMALLEST_RANGE, reach, torch.ones_like(reach)) / steps
    if symmetric:
        middle = 0 if qmin < 0 else (qmax + 1) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    return scale, (qmin - (low / scale).round()).clamp(qmin, qmax).to(torch.int32)


SMALLEST_RANGE = 2.0**-30
