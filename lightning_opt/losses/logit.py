"""Losses between the logits of a student and of a teacher, one position at a time.

The functions give one value per position, `(B,)` for `(B, C)` logits and `(B, T)` for `(B, T, V)`; the classes average
them over the positions that count.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32, kl, paired, soft_log_probs, standardize
from lightning_opt.losses.reduce import masked_mean
from lightning_opt.losses.schedules import Schedule, check_value, value_at


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return T squared times KL(teacher || student) of the softened distributions.

    Hinton, Vinyals, Dean (2015), "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, equation 1 and
    section 2.1. The factor T squared keeps the size of the gradient when T changes.

    Args:
        student_logits: `(..., C)`.
        teacher_logits: `(..., C)`.
        temperature: T, more than 0.

    Returns:
        `(...)`, one value per position.

    >>> kd(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=1.0)
    tensor([1.5232])
    """
    log_teacher = soft_log_probs(teacher_logits, temperature=temperature)
    return temperature**2 * kl(log_teacher, soft_log_probs(student_logits, temperature=temperature))


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Return the decoupled loss: the target class against the rest, and the rest among themselves.

    Zhao, Cui, Song, Qiu, Liang (2022), "Decoupled Knowledge Distillation", arXiv 2203.08679, section 3:
    alpha * TCKD + beta * NCKD, with T squared as in `kd`. With alpha 1 and beta equal to the teacher's probability of
    all other classes it is `kd`.

    Args:
        student_logits: `(..., C)`, at least 2 classes.
        teacher_logits: `(..., C)`.
        labels: `(...)` int64 classes; a negative label is read as class 0, so mask it.
        alpha: Weight of the target class part (TCKD).
        beta: Weight of the part among the other classes (NCKD).
        temperature: T, more than 0.

    Returns:
        `(...)`, one value per position.
    """
    target = labels.clamp(min=0).unsqueeze(-1)
    student, student_others = _split_target(soft_log_probs(student_logits, temperature=temperature), target)
    teacher, teacher_others = _split_target(soft_log_probs(teacher_logits, temperature=temperature), target)
    return temperature**2 * (alpha * kl(teacher, student) + beta * kl(teacher_others, student_others))


def _split_target(log_p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities `(..., 2)` of target and rest, and `(..., C)` of the rest by itself."""
    others = log_p.scatter(-1, target, -torch.inf)
    rest = others.logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_p.gather(-1, target), rest], dim=-1), others.log_softmax(dim=-1)


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, *, center: bool = False) -> Tensor:
    """Return the mean squared difference of the logits over the classes.

    Ba, Caruana (2014), "Do Deep Nets Really Need to be Deep?", arXiv 1312.6184, section 2
    (there half of the sum over the classes).

    Args:
        student_logits: `(..., C)`, finite.
        teacher_logits: `(..., C)`, finite.
        center: Subtract each position's mean first: a constant added to all logits changes no prediction.

    Returns:
        `(...)`, one value per position.
    """
    gap = at_least_float32(student_logits) - at_least_float32(teacher_logits)
    if center:
        gap = gap - gap.mean(dim=-1, keepdim=True)
    return gap.square().mean(dim=-1)


def sigmoid_kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return T squared times the KL of each label's yes-no distribution, averaged over the labels.

    Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang (2023), "Multi-Label Knowledge Distillation", arXiv 2308.06453: the
    one-versus-all reduction of the logits. There the labels are added up; averaged, it has the size of a mean binary
    cross-entropy.

    Args:
        student_logits: `(..., C)`, finite, one per label.
        teacher_logits: `(..., C)`.
        temperature: T, more than 0.

    Returns:
        `(...)`, one value per position.
    """
    student, teacher = at_least_float32(student_logits) / temperature, at_least_float32(teacher_logits) / temperature
    yes = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    no = (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return temperature**2 * (yes + no).mean(dim=-1)


class KD(DistillationLoss):
    """Match the teacher's softened distribution (see `kd`).

    Args:
        temperature: Softens both distributions; a number or a schedule, more than 0.
        standardize: Z-score each position's logits first (see `StandardizedKD`).
    """

    def __init__(self, *, temperature: float | Schedule = 4.0, standardize: bool = False) -> None:
        super().__init__()
        check_value("temperature", temperature, low=0.0, open_low=True)
        self.temperature = temperature
        self.standardize = standardize

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pair = _logits(student, teacher, supervision.mask, standardized=self.standardize)
        values = kd(*pair, temperature=value_at(self.temperature, supervision.progress))
        return masked_mean(values, supervision.mask)


class StandardizedKD(KD):
    """Match the shape of the teacher's logits, free of their size and offset: `KD` on Z-scores.

    Sun, Ren, Li, Wang, Cao (2024), "Logit Standardization in Knowledge Distillation", arXiv 2403.01427, algorithm 1. A
    weak student need not reach the teacher's large logits. The authors weight it about 9 times as much as plain KD.

    Args:
        temperature: Applied to the Z-scores; a number or a schedule, more than 0.
    """

    def __init__(self, *, temperature: float | Schedule = 2.0) -> None:
        super().__init__(temperature=temperature, standardize=True)


class DKD(DistillationLoss):
    """Weigh what the teacher says of the right class apart from what it says of the others (see `dkd`).

    Args:
        alpha: Weight of the target class part.
        beta: Weight of the part among the other classes, where most of the teacher's knowledge is.
        temperature: Softens both distributions; a number or a schedule, more than 0.
        warmup: Share of the run over which the loss grows linearly from 0, in [0, 1]; the authors use 20 of 240 epochs.
        standardize: Z-score each position's logits first (see `StandardizedKD`).
    """

    averages_over = "labelled"
    needs = frozenset({"logits", "labels"})

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float | Schedule = 4.0,
        warmup: float = 0.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        check_value("temperature", temperature, low=0.0, open_low=True)
        check_value("alpha", alpha, low=0.0)
        check_value("beta", beta, low=0.0)
        if not 0.0 <= warmup <= 1.0:
            raise ValueError(f"warmup must be in [0, 1], not {warmup}")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.warmup = warmup
        self.standardize = standardize

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        mask, labels = counted(supervision)
        student_logits, teacher_logits = _logits(student, teacher, mask, standardized=self.standardize)
        temperature = value_at(self.temperature, supervision.progress)
        values = dkd(student_logits, teacher_logits, labels, alpha=self.alpha, beta=self.beta, temperature=temperature)
        grown = min(supervision.progress / self.warmup, 1.0) if self.warmup else 1.0
        return grown * masked_mean(values, mask)


class LogitMSE(DistillationLoss):
    """Match the teacher's logits themselves (see `logit_mse`).

    Args:
        center: Subtract each position's mean first.
    """

    def __init__(self, *, center: bool = False) -> None:
        super().__init__()
        self.center = center

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pair = _logits(student, teacher, supervision.mask)
        return masked_mean(logit_mse(*pair, center=self.center), supervision.mask)


class SigmoidKD(DistillationLoss):
    """Match the teacher's yes or no for each label of a multilabel task (see `sigmoid_kd`).

    Args:
        temperature: Softens both; a number or a schedule, more than 0.
    """

    def __init__(self, *, temperature: float | Schedule = 1.0) -> None:
        super().__init__()
        check_value("temperature", temperature, low=0.0, open_low=True)
        self.temperature = temperature

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pair = _logits(student, teacher, supervision.mask)
        values = sigmoid_kd(*pair, temperature=value_at(self.temperature, supervision.progress))
        return masked_mean(values, supervision.mask)


def counted(supervision: Supervision) -> tuple[Tensor, Tensor]:
    """Return the mask without the positions that have no class (a negative label), and the labels.

    Raises:
        ValueError: There are no labels.
    """
    if supervision.labels is None:
        raise ValueError("this loss compares with the labels, and the batch has none")
    has_class = supervision.labels >= 0
    return (has_class if supervision.mask is None else has_class & supervision.mask), supervision.labels


def _logits(
    student: Signals, teacher: Signals, mask: Tensor | None, *, standardized: bool = False
) -> tuple[Tensor, Tensor]:
    student_logits, teacher_logits = paired(student.logits, teacher.logits, mask)
    if standardized:
        return standardize(student_logits), standardize(teacher_logits)
    return student_logits, teacher_logits
