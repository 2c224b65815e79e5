"""Rounding with gradients: straight through for the input, and for the size of a step where that is learned."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.quantization.grid import Grid

_ZERO = torch.zeros(())


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return the values of the grid nearest to `x`; scale and zero point broadcast against it."""
    inverse, scale, low, high = _numbers(x, scale, zero_point, grid)
    return _near(x * inverse, scale, low, high, grid)


def _near(steps: Tensor, scale: Any, low: Any, high: Any, grid: Grid) -> Tensor:
    """Round, clip and scale `steps`, in place."""
    if grid.is_float:
        return steps.clamp_(low, high).to(grid.storage).to(steps.dtype).mul_(scale)
    return _scaled(steps.round_().clamp_(low, high), scale)


def _scaled(steps: Tensor, scale: Any) -> Tensor:
    """Return `steps * scale` with no negative zero, which integers do not have; in one pass where that is possible."""
    if isinstance(scale, float):
        return torch.add(_ZERO, steps, alpha=scale, out=steps)
    return steps.mul_(scale).add_(0.0)


def _numbers(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Any, Any, Any, Any]:
    """Return 1 / scale, scale, and the least and the largest number of steps from 0.

    They are plain numbers where nobody has to wait for them: operators take a third less time with those.
    """
    fixed, inverse = grid.fixed_zero_point, scale.reciprocal()
    is_at_hand = x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if scale.dim() == 0 and is_at_hand:
        zero = int(zero_point) if fixed is None else fixed
        return float(inverse), float(scale), grid.qmin - zero, grid.qmax - zero
    if fixed is not None:
        return inverse, scale, grid.qmin - fixed, grid.qmax - fixed
    return inverse, scale, (grid.qmin - zero_point).to(x.dtype), (grid.qmax - zero_point).to(x.dtype)


def _between(values: Tensor, at: Tensor, low: Any, high: Any, *, is_spent: bool = False) -> Tensor:
    """Return `values` where `at` is between `low` and `high`, else 0; in one vectorised pass where that can be.

    Args:
        values: Any shape.
        at: The same shape.
        low: A number, or a tensor that broadcasts.
        high: The same.
        is_spent: The result may take the place of `at`: fresh memory costs more than what is computed here.
    """
    if isinstance(low, Tensor):
        return torch.where((at > low) & (at < high), values, 0.0)
    if is_spent and values.dtype == at.dtype and not torch.compiler.is_compiling():
        return torch.ops.aten.hardtanh_backward.grad_input(values, at, low, high, grad_input=at)
    return torch.ops.aten.hardtanh_backward(values, at, low, high)


def _summed(values: Tensor, shape: torch.Size) -> Tensor:
    """Return what `sum_to_size` does, ten times as fast: all axes after the last that stays are summed as one."""
    if not shape:
        return values.sum()
    kept = max(axis for axis in range(len(shape)) if shape[axis] > 1 or axis == 0) + 1
    if kept < len(shape):
        values = values.flatten(kept).sum(dim=-1).reshape(*values.shape[:kept], *shape[kept:])
    return values.sum_to_size(shape)


class StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is 1 inside the range and 0 outside. The input is all that is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, is_covered: bool) -> Tensor:
        inverse, factor, low, high = _numbers(x, scale, zero_point, grid)
        ctx.is_covered, ctx.edges = is_covered, None
        if not is_covered and isinstance(factor, float) and not grid.is_float:
            # The edges half a step beyond the last values, as inputs: no need to divide again.
            ctx.edges = (low - 0.5) * factor, (high + 0.5) * factor
            ctx.save_for_backward(x)
        elif not is_covered:
            ctx.grid = grid
            ctx.save_for_backward(x, scale, zero_point)
        return _near(x * inverse, factor, low, high, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_covered:
            return grads[0], None, None, None, None
        if ctx.edges is not None:
            return _between(grads[0], ctx.saved_tensors[0], *ctx.edges), None, None, None, None
        x, scale, zero_point = ctx.saved_tensors
        inverse, _, low, high = _numbers(x, scale, zero_point, ctx.grid)
        half = 0.0 if ctx.grid.is_float else 0.5
        return _between(grads[0], x * inverse, low - half, high + half, is_spent=True), None, None, None, None


class LearnedStep(torch.autograd.Function):
    """Rounding with a gradient for the scale, from all values (LSQ) or from those outside the range (PACT).

    The range ends at the last values of the grid, as in both papers, and not half a step beyond.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, weight: float, everywhere: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid, ctx.weight, ctx.everywhere = grid, weight, everywhere
        return rounded(x, scale.detach(), zero_point, grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        grid, grad = ctx.grid, grads[0]
        inverse, _, low, high = _numbers(x, scale, zero_point, grid)
        ratio = x * inverse
        near = ratio.clamp(low, high)
        near = near.to(grid.storage).to(ratio.dtype) if grid.is_float else near.round_()
        inside = _between(grad, ratio, low, high)
        # The gradient times: the nearest value, less the ratio inside (LSQ) or less that value itself (PACT).
        by_scale = near.mul_(grad).sub_(ratio.mul_(inside)) if ctx.everywhere else near.mul_(grad - inside)
        return inside, _summed(by_scale, scale.shape) * ctx.weight, None, None, None, None
