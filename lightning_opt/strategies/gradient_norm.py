"""The norm of all gradients and clipping by it, right when every process holds other pieces of other tensors.

torch's own `clip_grad_norm_` wants all gradients on one mesh. Here each process sums the squares of what it holds,
weighs them by how many processes hold the same, and one all-reduce gives the whole.
"""

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@torch.no_grad()
def global_norm(
    parameters: Iterable[Tensor], *, groups: Sequence[dist.ProcessGroup] = (), device: torch.device | None = None
) -> Tensor:
    """Return the 2-norm of the gradients of all parameters, the same on every process.

    Args:
        parameters: Those of this process: plain ones, which all processes hold alike, and `DTensor`s on any meshes.
        groups: Among which processes the parameters themselves are divided, such as the stages of a pipeline.
        device: Where the sum is reduced, when gradients lie where the process group cannot reach.

    Returns:
        A scalar in float32.
    """
    gradients = [_summed(one.grad) for one in parameters if one.grad is not None]
    where = device or (_piece(gradients[0]).device if gradients else torch.device("cpu"))
    processes = dist.get_world_size() if dist.is_initialized() else 1
    holders = processes // prod(dist.get_world_size(group) for group in groups)
    total = torch.zeros((), dtype=torch.float64, device=where)
    for copies, pieces in _by_copies(gradients, holders).items():
        norms = torch._foreach_norm([piece.float() for piece in pieces])
        # squared in float64: of many small tensors and a few large ones none is lost
        total += torch.stack(norms).to(total).square().sum() / copies
    if processes > 1:
        dist.all_reduce(total)
    return total.sqrt().float()


@torch.no_grad()
def clip_by_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    groups: Sequence[dist.ProcessGroup] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Scale gradients in place so that their norm is at most `max_norm`, and return the norm that they had.

    (Pascanu et al. 2012, arXiv 1211.5063, algorithm 1), with torch's small constant in the denominator.

    Args:
        parameters: As in `global_norm`.
        max_norm: The largest norm.
        groups: As in `global_norm`.
        device: As in `global_norm`.
    """
    parameters = list(parameters)
    norm = global_norm(parameters, groups=groups, device=device)
    scale_to_norm_(parameters, norm, max_norm)
    return norm


@torch.no_grad()
def scale_to_norm_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place as clipping does, for a norm that is known.

    Args:
        parameters: As in `global_norm`.
        norm: Of the gradients of all processes.
        max_norm: The largest norm.
    """
    scale = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
    if pieces := [_piece(one.grad) for one in parameters if one.grad is not None]:
        torch._foreach_mul_(pieces, scale.to(pieces[0].device))


@torch.no_grad()
def clip_by_value_(parameters: Iterable[Tensor], max_value: float) -> None:
    """Clamp every element of the gradients to `[-max_value, max_value]`, in place."""
    pieces = []
    for one in parameters:
        if one.grad is not None:
            one.grad = _summed(one.grad)
            pieces.append(_piece(one.grad))
    if pieces:
        torch._foreach_clamp_min_(pieces, -max_value)
        torch._foreach_clamp_max_(pieces, max_value)


def _piece(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _summed(gradient: Tensor) -> Tensor:
    """Return a gradient of which no process holds a mere summand."""
    if not isinstance(gradient, DTensor) or not any(one.is_partial() for one in gradient.placements):
        return gradient
    return gradient.redistribute(placements=[Replicate() if one.is_partial() else one for one in gradient.placements])


def _by_copies(gradients: Sequence[Tensor], holders: int) -> dict[float, list[Tensor]]:
    """Group this process's pieces by how many processes hold the same piece; `holders` hold the same parameters."""
    groups: dict[float, list[Tensor]] = {}
    for gradient in gradients:
        piece = _piece(gradient)
        if piece.numel():  # of a small tensor some processes hold nothing
            groups.setdefault(holders / _pieces(gradient), []).append(piece)
    return groups


def _pieces(gradient: Tensor) -> int:
    """Return into how many different pieces a gradient is cut."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return prod(mesh.size(dim) for dim, one in enumerate(gradient.placements) if not one.is_replicate())
