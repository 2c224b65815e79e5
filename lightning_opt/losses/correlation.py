"""Losses that compare how the predictions of a whole batch relate to each other.

They see the batch at once, so they give no value per position, and the batch of one process is what they see under
data-parallel training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.divergence import paired, soft_log_probs
from lightning_opt.losses.layers import exact
from lightning_opt.losses.logit import kd
from lightning_opt.losses.reduce import masked_mean
from lightning_opt.losses.schedules import Schedule, check_value, value_at


def pearson(a: Tensor, b: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return the correlation of two tensors over the last axis, 0 where either is constant."""
    a = a - a.mean(dim=-1, keepdim=True)
    b = b - b.mean(dim=-1, keepdim=True)
    return _cosine(a, b, dim=-1, eps=eps)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    inter: float = 1.0,
    intra: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return one minus the correlation of the predictions, within samples and within classes.

    Huang, You, Wang, Qian, Xu (2022), "Knowledge Distillation from A Stronger Teacher", arXiv 2205.10536, section 3:
    `inter` over the classes of each sample, `intra` over the samples for each class, with the Pearson distance
    1 - cov(u, v) / (std(u) std(v)); times T squared, and with 1e-8 added below the fraction, as in its authors' code: a
    class of which the batch holds next to nothing counts as uncorrelated and has no gradient.

    Args:
        student_logits: `(..., C)`; all axes but the last are samples.
        teacher_logits: `(..., C)`.
        mask: Bool `(...)`; False positions are no samples.
        inter: Weight of the first part (beta in the paper).
        intra: Weight of the second part (gamma in the paper); it needs at least 2 samples.
        temperature: T, more than 0.

    Returns:
        A scalar.
    """
    student = soft_log_probs(student_logits, temperature=temperature).exp().flatten(0, -2)
    teacher = soft_log_probs(teacher_logits, temperature=temperature).exp().flatten(0, -2)
    rows = None if mask is None else mask.flatten()
    within_samples = masked_mean(1.0 - pearson(student, teacher), rows)
    within_classes = (1.0 - _cosine(_centred(student, rows), _centred(teacher, rows), dim=0)).mean()
    if rows is not None:
        within_classes = torch.where(rows.any(), within_classes, 0.0)
    return temperature**2 * (inter * within_samples + intra * within_classes)


def gram_gaps(student: Tensor, teacher: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return the squared gaps between the samples' and the classes' Gram matrices of `(N, C)` probabilities.

    Args:
        student: `(N, C)`, zero rows for samples that do not count.
        teacher: `(N, C)`, likewise.
        count: How many of the N samples count.

    Returns:
        Two scalars: the batch level, divided by `count`, and the class level, divided by C.
    """
    with exact(student):
        batch = (student @ student.T - teacher @ teacher.T).square().sum() / count
        classes = (student.T @ student - teacher.T @ teacher).square().sum() / student.shape[-1]
    return batch, classes


class DIST(DistillationLoss):
    """Match how the teacher ranks classes within samples and samples within classes (see `dist`).

    Correlation forgives a student whose logits are smaller than a much stronger teacher's.

    Args:
        inter: Weight of the relation between the classes of one sample.
        intra: Weight of the relation between the samples of one batch, class by class.
        temperature: A number or a schedule, more than 0.
    """

    couples_samples = True

    def __init__(self, *, inter: float = 1.0, intra: float = 1.0, temperature: float | Schedule = 1.0) -> None:
        super().__init__()
        check_value("temperature", temperature, low=0.0, open_low=True)
        check_value("inter", inter, low=0.0)
        check_value("intra", intra, low=0.0)
        self.inter = inter
        self.intra = intra
        self.temperature = temperature

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        temperature = value_at(self.temperature, supervision.progress)
        pair = paired(student.logits, teacher.logits, supervision.mask)
        return dist(*pair, supervision.mask, inter=self.inter, intra=self.intra, temperature=temperature)


class MultiLevelKD(DistillationLoss):
    """Match predictions one by one, sample against sample and class against class, at several temperatures.

    Jin, Wang, Lin (2023), "Multi-Level Logit Distillation", CVPR 2023, pages 24276 to 24285: the instance, batch and
    class level alignment, each added up over the temperatures. The authors also augment the inputs, which is left to
    the data module, and leave out samples of which the teacher is unsure, which is not done here.

    Memory grows with N squared and C squared, where N is the number of positions: made for classes, not vocabularies.

    Args:
        temperatures: Each more than 0.
        instance: Weight of KD for each position.
        batch: Weight of the samples' Gram matrices.
        classes: Weight of the classes' Gram matrices.

    Raises:
        ValueError: There is no temperature, or a value is out of range.
    """

    couples_samples = True

    def __init__(
        self,
        *,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        instance: float = 1.0,
        batch: float = 1.0,
        classes: float = 1.0,
    ) -> None:
        super().__init__()
        if not temperatures:
            raise ValueError("temperatures must hold at least one number, not []")
        for temperature in temperatures:
            check_value("temperatures", temperature, low=0.0, open_low=True)
        for name, weight in (("instance", instance), ("batch", batch), ("classes", classes)):
            check_value(name, weight, low=0.0)
        self.temperatures = tuple(temperatures)
        self.instance = instance
        self.batch = batch
        self.classes = classes

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pair = paired(student.logits, teacher.logits, supervision.mask)
        mask = supervision.mask
        levels = [self._one_temperature(*pair, mask, temperature=temperature) for temperature in self.temperatures]
        return torch.stack(levels).sum()

    def _one_temperature(self, student: Tensor, teacher: Tensor, mask: Tensor | None, *, temperature: float) -> Tensor:
        instance = masked_mean(kd(student, teacher, temperature=temperature), mask)
        ours, theirs = (
            soft_log_probs(logits, temperature=temperature).exp().flatten(0, -2) for logits in (student, teacher)
        )
        count: Tensor | int = max(len(ours), 1)
        if mask is not None:
            counts = mask.flatten().unsqueeze(-1)
            ours, theirs, count = ours * counts, theirs * counts, mask.sum().clamp(min=1)
        batch, classes = gram_gaps(ours, theirs, count)
        return self.instance * instance + self.batch * batch + self.classes * classes


def _cosine(a: Tensor, b: Tensor, *, dim: int, eps: float = 1e-8) -> Tensor:
    # vector_norm has gradient 0 at 0, where a square root would give NaN.
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return (a * b).sum(dim=dim) / (norms + eps)


def _centred(values: Tensor, rows: Tensor | None) -> Tensor:
    """Subtract each column's mean over the rows that count, and blank the others."""
    if rows is None:
        return values - values.mean(dim=0, keepdim=True)
    counts = rows.unsqueeze(-1)
    mean = (values * counts).sum(dim=0, keepdim=True) / counts.sum().clamp(min=1)
    return (values - mean) * counts
