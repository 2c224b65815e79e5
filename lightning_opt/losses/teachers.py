"""Several teachers as one: how much each counts for each sample, and what they say together.

Every loss over logits then works with any number of teachers, unchanged:
`combine_teachers(signals, ConfidenceWeights()(signals, supervision))`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32, soft_log_probs
from lightning_opt.losses.reduce import mean_per_sample

ErrorOf: TypeAlias = Callable[[Tensor, Supervision], Tensor]
Mix: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class TeacherWeights(Protocol):
    """How much each teacher counts for each sample."""

    def __call__(self, teacher_signals: Sequence[Signals], supervision: Supervision) -> Tensor:
        """Return `(K, B)` weights of K teachers; each column adds up to 1."""


class FixedWeights:
    """Give each teacher the same share for every sample.

    Args:
        weights: One number a teacher, at least 0; they are divided by their sum. None: all count the same.

    Raises:
        ValueError: A weight is negative, or all are 0.
    """

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        if weights is not None and not (all(weight >= 0 for weight in weights) and sum(weights) > 0):
            raise ValueError(f"weights must be at least 0 and not all 0, not {list(weights)}")
        self.weights = None if weights is None else [weight / sum(weights) for weight in weights]

    def __call__(self, teacher_signals: Sequence[Signals], supervision: Supervision) -> Tensor:
        """Return `(K, B)` weights.

        Raises:
            ValueError: There is not one weight a teacher.
        """
        count = len(teacher_signals)
        shares = [1.0 / count] * count if self.weights is None else self.weights
        if len(shares) != count:
            raise ValueError(f"weights holds {len(shares)} numbers for {count} teachers")
        logits = teacher_signals[0].logits
        dtype = torch.promote_types(logits.dtype, torch.float32)
        column = torch.tensor(shares, dtype=dtype, device=logits.device)
        return column.unsqueeze(-1).expand(-1, len(logits))


def cross_entropy(logits: Tensor, supervision: Supervision) -> Tensor:
    """Return each sample's cross-entropy with its classes, averaged over the tokens that count: `(B,)`."""
    labels = _labels(supervision)
    counts = labels >= 0 if supervision.mask is None else (labels >= 0) & supervision.mask
    values = -soft_log_probs(logits).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return mean_per_sample(values, counts)


def binary_cross_entropy(logits: Tensor, supervision: Supervision) -> Tensor:
    """Return each sample's binary cross-entropy with its labels, averaged over them: `(B,)`."""
    logits = at_least_float32(logits)
    labels = _labels(supervision).to(logits.dtype)
    return mean_per_sample(binary_cross_entropy_with_logits(logits, labels, reduction="none"))


def squared_error(logits: Tensor, supervision: Supervision) -> Tensor:
    """Return each sample's squared error, averaged over its numbers: `(B,)`."""
    logits = at_least_float32(logits)
    return mean_per_sample((logits - _labels(supervision).to(logits.dtype).reshape(logits.shape)).square())


class ConfidenceWeights:
    """Trust a teacher on a sample the more, the nearer it comes to the label.

    Zhang, Chen, Wang (2022), "Confidence-Aware Multi-Teacher Knowledge Distillation", arXiv 2201.00007: teacher k of K
    gets (1 - exp(L_k) / sum_j exp(L_j)) / (K - 1), where L_k is its cross-entropy with the label.

    Args:
        error: Each teacher's error per sample: `cross_entropy`, `binary_cross_entropy` or `squared_error`.
    """

    def __init__(self, *, error: ErrorOf = cross_entropy) -> None:
        self.error = error

    def __call__(self, teacher_signals: Sequence[Signals], supervision: Supervision) -> Tensor:
        """Return `(K, B)` weights.

        Raises:
            ValueError: The batch has no labels.
        """
        errors = torch.stack([self.error(signals.logits.detach(), supervision) for signals in teacher_signals])
        if len(errors) == 1:
            return torch.ones_like(errors)
        return (1.0 - errors.softmax(dim=0)) / (len(errors) - 1)


def mix_probabilities(logits: Tensor, weights: Tensor) -> Tensor:
    """Average K teachers' class probabilities; the answer is their logarithm, which serves as logits.

    Args:
        logits: `(K, B, ..., C)`.
        weights: `(K, B)`, or more axes of size 1 behind.

    Returns:
        `(B, ..., C)`.
    """
    return (soft_log_probs(logits) + weights.log()).logsumexp(dim=0)


def mix_sigmoids(logits: Tensor, weights: Tensor) -> Tensor:
    """Average K teachers' yes-no probabilities, label by label; the answer is their logit. Shapes as above."""
    logits = at_least_float32(logits)
    yes = (logsigmoid(logits) + weights.log()).logsumexp(dim=0)
    no = (logsigmoid(-logits) + weights.log()).logsumexp(dim=0)
    return yes - no


def mix_values(logits: Tensor, weights: Tensor) -> Tensor:
    """Average K teachers' numbers themselves, for regression. Shapes as above."""
    return (at_least_float32(logits) * weights).sum(dim=0)


def combine_teachers(teacher_signals: Sequence[Signals], weights: Tensor, *, mix: Mix = mix_probabilities) -> Signals:
    """Make one teacher of several.

    Args:
        teacher_signals: K of them, logits of one shape `(B, ...)`.
        weights: `(K, B)`; each column adds up to 1.
        mix: What is averaged: `mix_probabilities` for classes and tokens, `mix_sigmoids` for multilabel tasks,
            `mix_values` for regression.

    Returns:
        The only teacher as it is; of several the mixed logits, and each feature under "NUMBER.NAME", as in "0.layer3".

    Raises:
        ValueError: There is no teacher, or the teachers' logits or the weights differ in shape.
    """
    if not teacher_signals:
        raise ValueError("there is no teacher to combine")
    if len(teacher_signals) == 1:
        return teacher_signals[0]
    shapes = {tuple(signals.logits.shape) for signals in teacher_signals}
    if len(shapes) > 1:
        raise ValueError(f"teachers must answer with one shape of logits, not {sorted(shapes)}")
    logits = torch.stack([signals.logits.detach() for signals in teacher_signals])
    if weights.shape != logits.shape[:2]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; the teachers need {tuple(logits.shape[:2])}")
    features = {
        f"{number}.{name}": feature
        for number, signals in enumerate(teacher_signals)
        for name, feature in signals.features.items()
    }
    return Signals(logits=mix(logits, weights.reshape(*weights.shape, *[1] * (logits.ndim - 2))), features=features)


def _labels(supervision: Supervision) -> Tensor:
    if supervision.labels is None:
        raise ValueError("teachers can be weighed by their confidence only with labels, and the batch has none")
    return supervision.labels
