"""The regularizer that goes with `BatchNormScale`."""

from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_opt.pruning.parts import local_of


def batch_norm_scales(model: nn.Module, *, include: str = "*") -> list[nn.Parameter]:
    """Return the scales of the batch norms whose full module names match `include`.

    Raises:
        ValueError: There are none.
    """
    modules = [part for name, part in model.named_modules() if isinstance(part, _BatchNorm) and fnmatch(name, include)]
    scales = [part.weight for part in modules if part.weight is not None]
    if not scales:
        raise ValueError(f"include={include!r} matches no batch norm with a scale in {type(model).__name__}")
    return scales


def sparsity_penalty(model: nn.Module, *, strength: float = 1e-4, include: str = "*") -> Tensor:
    """Return `strength` times the sum of all `|gamma|`, to be added to the loss.

    Liu et al. (2017), arXiv 1708.06519, equation 1. The authors use 1e-4 (VGG) and 1e-5 (ResNet, DenseNet).

    Args:
        model: Has batch norms.
        strength: lambda, 0 or more.
        include: Pattern (`fnmatch`) of full module names.

    Raises:
        ValueError: There is no batch norm of that name, or the strength is negative.
    """
    _check(strength)
    return strength * torch.stack([scale.abs().sum() for scale in batch_norm_scales(model, include=include)]).sum()


@torch.no_grad()
def add_sparsity_gradient(scales: list[nn.Parameter], *, strength: float = 1e-4) -> None:
    """Add the penalty's subgradient, `strength * sign(gamma)`, to the gradients of `scales` after a backward.

    The same as adding `sparsity_penalty` to the loss, for whoever does not own the loss. Scales without a gradient are
    left alone.

    Raises:
        ValueError: The strength is negative.
    """
    _check(strength)
    found = [(scale, scale.grad) for scale in scales if scale.grad is not None]
    if found:
        signs = torch._foreach_sign([local_of(scale.detach()) for scale, _ in found])
        torch._foreach_add_([local_of(gradient) for _, gradient in found], signs, alpha=strength)


def _check(strength: float) -> None:
    if not strength >= 0.0:
        raise ValueError(f"strength must be at least 0, not {strength}")
