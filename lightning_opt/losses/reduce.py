"""Means over the positions that count.

Nothing here waits for the device: a mask is never read by the host, and a mask that is False everywhere gives 0, still
joined to the graph.
"""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Add up `values` where `mask` is True; a value under False may be anything, NaN included.

    Args:
        values: Any shape.
        mask: Bool, shape of `values`. None: everything counts.

    Raises:
        ValueError: The shapes differ.
    """
    return values.sum() if mask is None else torch.where(_checked(mask, values.shape), values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average `values` where `mask` is True; 0 when nothing counts.

    Args:
        values: Any shape.
        mask: Bool, shape of `values`. None: everything counts.

    Raises:
        ValueError: The shapes differ.
    """
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def mean_per_sample(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average `(B, ...)` values over all axes but the first, where `mask` is True; 0 for a sample that has none.

    Raises:
        ValueError: The shapes differ.
    """
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    total = torch.where(_checked(mask, values.shape), values, 0.0).reshape(len(values), -1).sum(dim=1)
    return total / mask.reshape(len(values), -1).sum(dim=1).clamp(min=1)


def blank(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Put zeros over the last axis wherever `mask` is False.

    Blanking what goes into a loss, and not only what comes out of it, keeps a NaN at a padded position out of the
    gradients too.

    Args:
        tensor: `(B, C)` or `(B, T, V)`.
        mask: Bool `(B,)` or `(B, T)`. None: nothing is blanked.

    Raises:
        ValueError: The mask's shape is not that of `tensor` without its last axis.
    """
    if mask is None:
        return tensor
    return torch.where(_checked(mask, tensor.shape[:-1]).unsqueeze(-1), tensor, 0.0)


def _checked(mask: Tensor, shape: torch.Size) -> Tensor:
    if mask.shape != shape:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; the values need {tuple(shape)}")
    return mask
