"""Divergences between categorical distributions, in log space and at least in float32.

The logit and the sequence family are both made of these. All return one value per position: `(B, C)` gives `(B,)`,
`(B, T, V)` gives `(B, T)`.
"""

import math

import torch
from torch import Tensor

from lightning_opt.losses.reduce import blank

# Far below any log-probability that float32 logits can give, yet finite, so that sums of it have a gradient.
_LOWEST = -1e30


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision to float32; leave float32 and float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def paired(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Make two networks' logits ready for a loss: same shape, wide enough, blank where masked, teacher detached.

    Args:
        student: `(B, C)` or `(B, T, V)`.
        teacher: The same shape.
        mask: Bool, that shape without its last axis, or None.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "a loss over logits needs the same classes or vocabulary in both"
        )
    return blank(at_least_float32(student), mask), blank(at_least_float32(teacher.detach()), mask)


def soft_log_probs(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of logits softened by `temperature`, over the last axis.

    Raises:
        ValueError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) for each position, from log-probabilities.

    A class that either network has ruled out (a logit of -inf, such as a padded vocabulary) adds nothing: no step of
    training could change it.
    """
    ruled_out = torch.isneginf(log_p) | torch.isneginf(log_q)
    return (log_p.exp() * (log_p - log_q).masked_fill(ruled_out, 0.0)).sum(dim=-1)


def log_mixture(log_p: Tensor, log_q: Tensor, *, share: float) -> Tensor:
    """Return the log of `share * p + (1 - share) * q`, for a share in (0, 1)."""
    # Two -inf would have no gradient in logaddexp.
    return torch.logaddexp(log_p.clamp(min=_LOWEST) + math.log(share), log_q.clamp(min=_LOWEST) + math.log1p(-share))


def standardize(logits: Tensor, *, smallest: float = 1e-3) -> Tensor:
    """Give each position's logits mean 0 and standard deviation 1 over the classes.

    Sun, Ren, Li, Wang, Cao (2024), "Logit Standardization in Knowledge Distillation", arXiv 2403.01427, algorithm 1:
    the Z-score, with the population's deviation (divided by C). The temperature is applied afterwards. A class at -inf
    stays there and is left out of mean and deviation. A deviation below `smallest` counts as that much: a student whose
    last layer starts at zero would otherwise have an unbounded gradient.
    """
    logits = at_least_float32(logits)
    ruled_out = torch.isneginf(logits)
    count = (~ruled_out).sum(dim=-1, keepdim=True).clamp(min=1)
    known = logits.masked_fill(ruled_out, 0.0)
    centred = (known - known.sum(dim=-1, keepdim=True) / count).masked_fill(ruled_out, 0.0)
    # vector_norm has gradient 0 for equal logits, where a square root would give NaN.
    deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / count.to(logits.dtype).sqrt()
    return (centred / deviation.clamp(min=smallest)).masked_fill(ruled_out, -torch.inf)
