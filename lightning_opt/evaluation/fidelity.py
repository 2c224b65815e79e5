"""How closely a student says what its teacher says, on the same inputs.

Each function takes logits of the same shape and a mask that says which positions count, and returns plain numbers.
Sums are taken in float64.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid


def class_fidelity(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> dict[str, float]:
    """Compare two sets of class or token logits.

    Args:
        student: `(B, C)` or `(B, T, C)` logits.
        teacher: The same shape.
        mask: Bool, the shape without the last axis; False positions do not count.

    Returns:
        `argmax_agreement` in [0, 1], `kl` of the teacher from the student in nats per position, and
        `mean_abs_logit_difference`.

    Raises:
        ValueError: The shapes differ, or no position counts.
    """
    student, teacher = _select(student, teacher, mask, class_axis=True)
    log_student, log_teacher = log_softmax(student, -1), log_softmax(teacher, -1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).nan_to_num(nan=0.0).sum(-1)
    return {
        "argmax_agreement": float((student.argmax(-1) == teacher.argmax(-1)).double().mean()),
        "kl": float(divergence.mean()),
        "mean_abs_logit_difference": float((student - teacher).abs().mean()),
    }


def label_fidelity(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> dict[str, float]:
    """Compare two sets of multilabel logits `(B, C)`, each label a yes or no of its own.

    Returns:
        `label_agreement` in [0, 1] at probability one half, `kl` in nats per label (Bernoulli), and
        `mean_abs_logit_difference`.

    Raises:
        ValueError: The shapes differ, or no position counts.
    """
    student, teacher = _select(student, teacher, mask, class_axis=True)
    yes = teacher.sigmoid()
    divergence = yes * (logsigmoid(teacher) - logsigmoid(student))
    divergence = divergence + (1 - yes) * (logsigmoid(-teacher) - logsigmoid(-student))
    return {
        "label_agreement": float(((student > 0) == (teacher > 0)).double().mean()),
        "kl": float(divergence.mean()),
        "mean_abs_logit_difference": float((student - teacher).abs().mean()),
    }


def value_fidelity(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> dict[str, float | None]:
    """Compare two sets of predicted values `(B,)` or `(B, D)`.

    Returns:
        `mean_abs_difference`, and `rank_correlation` (Spearman, ties share their mean rank; averaged over D; None when
        one side is constant).

    Raises:
        ValueError: The shapes differ, or no position counts.
    """
    student, teacher = _select(student, teacher, mask, class_axis=student.dim() > 1)
    columns = [(student, teacher)] if student.dim() == 1 else list(zip(student.T, teacher.T, strict=True))
    ranks = [rank_correlation(ours, theirs) for ours, theirs in columns]
    known = [value for value in ranks if value is not None]
    return {
        "mean_abs_difference": float((student - teacher).abs().mean()),
        "rank_correlation": sum(known) / len(known) if len(known) == len(ranks) else None,
    }


def rank_correlation(left: Tensor, right: Tensor) -> float | None:
    """Return Spearman's rank correlation of two `(N,)` tensors; None when one of them is constant."""
    a, b = _ranks(left), _ranks(right)
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if scale > 0 else None


def _ranks(values: Tensor) -> Tensor:
    """Rank `(N,)` values from 0; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]


def _select(student: Tensor, teacher: Tensor, mask: Tensor | None, *, class_axis: bool) -> tuple[Tensor, Tensor]:
    """Return the positions that count, in float64: `(N, C)`, or `(N,)` without a class axis."""
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher differ in shape: {tuple(student.shape)} and {tuple(teacher.shape)}")
    positions = student.shape[:-1] if class_axis else student.shape
    if mask is not None and mask.shape != positions:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {tuple(positions)}")
    keep = torch.ones(positions, dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    if not bool(keep.any()):
        raise ValueError("no position counts: the mask is False everywhere or the batch is empty")
    return student[keep].double(), teacher[keep].double()
