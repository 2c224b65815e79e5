"""Losses between the numbers that a student and a teacher predict.

Predictions are `(B,)` or `(B, D)`; a `(B, 1)` answer and a `(B,)` one are the same thing.
"""

import torch
from torch import Tensor

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32, paired
from lightning_opt.losses.reduce import masked_mean
from lightning_opt.losses.schedules import check_value


def squared_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the squared distance of each sample over its D numbers: `(B, D)` gives `(B,)`."""
    return (predictions - targets).square().sum(dim=-1)


def bounded_regression_kd(student: Tensor, teacher: Tensor, labels: Tensor, *, margin: float = 0.0) -> Tensor:
    """Return the student's squared error where it is not better than the teacher's by `margin`, else 0.

    Chen, Choi, Yu, Han, Chandraker (2017), "Learning Efficient Object Detection Models with Knowledge Distillation",
    NIPS 2017, equation 4: the teacher is a bound to pass, not a value to copy, since its answer may lie anywhere.

    Args:
        student: `(B, D)` predictions.
        teacher: `(B, D)` predictions.
        labels: `(B, D)` truth.
        margin: By how much the squared error must be below the teacher's before the student is left alone.

    Returns:
        `(B,)`, one value per sample.
    """
    error = squared_distance(student, labels)
    return torch.where(error + margin > squared_distance(teacher, labels), error, 0.0)


class RegressionKD(DistillationLoss):
    """Pull the student's numbers to the teacher's: the mean squared difference."""

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pair = paired(as_columns(student.logits), as_columns(teacher.logits), supervision.mask)
        return masked_mean(squared_distance(*pair) / max(pair[0].shape[-1], 1), supervision.mask)


class BoundedRegressionKD(DistillationLoss):
    """Pull the student to the truth for as long as it is not better than the teacher (see `bounded_regression_kd`).

    Args:
        margin: By how much the squared error must be below the teacher's before the student is left alone; at least 0.
    """

    needs = frozenset({"logits", "labels"})

    def __init__(self, *, margin: float = 0.0) -> None:
        super().__init__()
        check_value("margin", margin, low=0.0)
        self.margin = margin

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        if supervision.labels is None:
            raise ValueError("this loss compares with the labels, and the batch has none")
        pair = paired(as_columns(student.logits), as_columns(teacher.logits), supervision.mask)
        labels, _ = paired(as_columns(supervision.labels), pair[1], supervision.mask)
        values = bounded_regression_kd(*pair, labels.to(pair[0].dtype), margin=self.margin)
        return masked_mean(values, supervision.mask)


def as_columns(values: Tensor) -> Tensor:
    """Return `(B,)` numbers as `(B, 1)`, others as they are, at least in float32."""
    return at_least_float32(values.unsqueeze(-1) if values.ndim == 1 else values)
