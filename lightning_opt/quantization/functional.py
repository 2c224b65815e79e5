"""Rounding to a grid and back, as functions: plain, with a straight-through gradient, and with learned steps.

`quantize`, `dequantize` and `fake_quantize` compute the same numbers, bit for bit, so that a network that was trained
with one answers the same with the others. They are also those of `torch.fake_quantize_per_tensor_affine`: a value is
multiplied with the reciprocal of the scale and rounded half to even. On CPUs that kernel handles one value at a time;
the same in plain operators, and the gradient from the input instead of from a mask, takes a quarter of its time.
"""

import torch
from torch import Tensor

from lightning_opt.quantization import ops
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.straight_through import LearnedStep, StraightThrough, rounded


def scale_and_zero_point(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point of the grid that just covers the range from `low` to `high` and 0.

    A range of (nearly) nothing counts as one of 1: such a tensor is all zeros, and whatever is derived from the scale
    stays of ordinary size.

    Args:
        low: Smallest values, `(n,)`.
        high: Largest values, `(n,)`.
        grid: Where the values will lie.

    Returns:
        Float `(n,)` and int32 `(n,)`.

    Example:
        >>> low, high = torch.tensor([-1.0]), torch.tensor([2.0])
        >>> scale, zero_point = scale_and_zero_point(low, high, Grid(bits=2, symmetric=False, signed=False))
        >>> scale.tolist(), zero_point.tolist()
        ([1.0], [1])
    """
    low, high = ops.widen(low), ops.widen(high)
    return ops.range_to_scale(low, high, symmetric=grid.symmetric, qmin=grid.qmin, qmax=grid.qmax)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return the integers (int8 or uint8; float8 for such a grid) that stand for `x`, in its shape."""
    laid, scale, zero_point = _aligned(x, scale, zero_point, grid)
    steps = laid * scale.reciprocal()
    if not grid.is_float:
        steps = steps.round_().add_(zero_point)
    return _restored(steps.clamp_(grid.qmin, grid.qmax).to(grid.storage), x, grid)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return the values that the integers `q` stand for, in the dtype of the scale."""
    if ops.is_exporting():
        return ops.dequantize(q, scale, zero_point, grid.axis, grid.group_size)
    return ops.dequantize_plain(q, scale, zero_point, grid.axis, grid.group_size)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, *, is_covered: bool = False) -> Tensor:
    """Return the values of the grid nearest to `x`, in its shape and dtype.

    The gradient goes straight through where `x` rounds to a value within the range of the grid, and is 0 outside
    (Bengio, Leonard, Courville, 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", arXiv 1308.3432). The scale gets none; see `lsq` and `pact`.

    Args:
        x: Any float tensor; narrower ones are rounded in float32.
        scale: `(n,)`, with n as `grid.channels(x)`.
        zero_point: int32 `(n,)`.
        grid: What to round to.
        is_covered: The range is that of `x` itself, so that nothing is outside and nothing has to be looked at.
    """
    if ops.is_exporting() and not grid.is_float and grid.group_size is None:
        return ops.quantize_dequantize(x, scale, zero_point, grid.axis, grid.qmin, grid.qmax)
    laid, scale, zero_point = _aligned(x, scale, zero_point, grid)
    if torch.is_grad_enabled() and x.requires_grad:
        near: Tensor = StraightThrough.apply(laid, scale, zero_point, grid, is_covered)
    else:
        near = rounded(laid, scale, zero_point, grid)
    return _restored(near, x, grid).to(x.dtype)


def lsq(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Do what `fake_quantize` does, with a gradient for the scale: learned step size quantization.

    Esser, McKinstry, Bablani, Appuswamy, Modha (2019), "Learned Step Size Quantization", arXiv 1902.08153, equation 3,
    with the gradient's scale of section 2.2: 1 / sqrt(number of values that share a step * qmax).
    """
    laid, scale, zero_point = _aligned(x, scale, zero_point, grid)
    sharing = laid.numel() / max(scale.numel(), 1)
    weight = float(max(sharing, 1.0) * grid.qmax) ** -0.5
    return _restored(LearnedStep.apply(laid, scale, zero_point, grid, weight, True), x, grid).to(x.dtype)


def pact(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Do what `fake_quantize` does, with a gradient for the scale from what is clipped only.

    Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan (2018), "PACT: Parameterized Clipping Activation for
    Quantized Neural Networks", arXiv 1805.06085, equation 3. The clipping value there is `scale * (qmax - zero_point)`.
    On a grid with negative values the lower end is learned in the same way.
    """
    laid, scale, zero_point = _aligned(x, scale, zero_point, grid)
    return _restored(LearnedStep.apply(laid, scale, zero_point, grid, 1.0, False), x, grid).to(x.dtype)


def dynamic_fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Do what `fake_quantize` does with the range of `x` itself, with one scale."""
    if ops.is_exporting():
        return ops.dynamic_quantize_dequantize(x, grid.symmetric, grid.qmin, grid.qmax)
    low, high = torch.aminmax(ops.widen(x.detach()))
    return fake_quantize(x, *scale_and_zero_point(low.reshape(1), high.reshape(1), grid), grid, is_covered=True)


def _aligned(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Lay `x` out by groups if there are any, and shape scale and zero point to broadcast against it."""
    wide = ops.widen(x)
    if grid.group_size is not None and grid.axis is not None:
        shape = ops.group_shape(x, grid.axis, grid.group_size)
        return ops.group(wide, grid.axis, grid.group_size), scale.reshape(shape), zero_point.reshape(shape)
    return wide, ops.along(scale, x, grid.axis), ops.along(zero_point, x, grid.axis)


def _restored(laid: Tensor, x: Tensor, grid: Grid) -> Tensor:
    return ops.ungroup(laid, x, grid.axis) if grid.group_size is not None and grid.axis is not None else laid
