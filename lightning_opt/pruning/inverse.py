"""How an error in one weight of a layer is best made good by the others: the inverse of its inputs' Gram matrix."""

import torch
from torch import Tensor

_ATTEMPTS = 6


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of each damped Gram matrix, `(G, I, I)` float32.

    An input that was never seen has no share in anything: its error is not spread.

    Raises:
        ValueError: A matrix has no factor even with much damping.
    """
    gram = gram.double()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    mean = diagonal.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    gram = gram + torch.diag_embed(torch.where(alive, 0.0, mean))
    share = torch.full_like(mean, damping)
    for _ in range(_ATTEMPTS):
        lower, no_lower = torch.linalg.cholesky_ex(gram + torch.diag_embed((share * mean).expand_as(diagonal)))
        upper, no_upper = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        failed = (no_lower != 0) | (no_upper != 0)
        if not failed.any():
            return upper.float()
        share = torch.where(failed[:, None], share * 10.0, share)
    raise ValueError("the inputs' X^T X has no Cholesky factor even with much damping; are the inputs finite?")
