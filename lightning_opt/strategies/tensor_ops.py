"""What tensor-parallel layers say to each other: four operations, each the other's gradient.

(Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3: f and g.) They work on plain tensors, so that whatever
lies between two cut layers need not know that they are cut.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return own_part(gradients[0], ctx.group, ctx.dim), None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return own_part(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gathered(gradients[0], ctx.group, ctx.dim), None, None


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group) / dist.get_world_size(ctx.group), None


def enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Hand a whole tensor to layers that each process holds a part of; their gradients are summed (Megatron's f)."""
    return _Enter.apply(x, group) if x.requires_grad else x


def sum_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add what each process computed, and give the sum to all (Megatron's g)."""
    return _Sum.apply(x, group)


def put_together(x: Tensor, group: dist.ProcessGroup, *, dim: int = -1) -> Tensor:
    """Join the processes' parts of a tensor along a dimension."""
    return _Gather.apply(x, group, dim)


def cut(x: Tensor, group: dist.ProcessGroup, *, dim: int = -1) -> Tensor:
    """Keep this process's part of a tensor that all of them hold whole."""
    return _Cut.apply(x, group, dim)


def average_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a tensor whose gradient is the mean over the processes."""
    return _Average.apply(x, group) if x.requires_grad else x


def own_part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return this process's part of a tensor, without a gradient."""
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def gathered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return the parts of all processes as one tensor, without a gradient."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
