"""Losses between next-token distributions: `(B, T, V)` logits, `(B, T)` masks.

All of them work over `(B, C)` logits too. `temperature` softens both distributions, without the factor T squared of
`KD`: language models are distilled at or near T = 1.
"""

from torch import Tensor

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.divergence import kl, log_mixture, paired, soft_log_probs
from lightning_opt.losses.reduce import masked_mean
from lightning_opt.losses.schedules import Schedule, check_value, value_at


def generalized_jsd(log_teacher: Tensor, log_student: Tensor, *, beta: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence from log-probabilities.

    Agarwal and others (2024), "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    arXiv 2306.13649, equation 1, with m = beta * p + (1 - beta) * q for teacher p and student q:
    beta * KL(p || m) + (1 - beta) * KL(q || m).

    Args:
        log_teacher: `(..., V)`.
        log_student: `(..., V)`.
        beta: In [0, 1]; 0 stands for the forward and 1 for the reverse KL, the limits of the divergence divided by its
            vanishing weight.

    Returns:
        `(...)`, one value per position.
    """
    if beta == 0.0:
        return kl(log_teacher, log_student)
    if beta == 1.0:
        return kl(log_student, log_teacher)
    middle = log_mixture(log_teacher, log_student, share=beta)
    return beta * kl(log_teacher, middle) + (1.0 - beta) * kl(log_student, middle)


class Divergence(DistillationLoss):
    """Average a divergence over the positions that count.

    Args:
        temperature: Softens both distributions; a number or a schedule, more than 0.
    """

    def __init__(self, *, temperature: float | Schedule = 1.0) -> None:
        super().__init__()
        check_value("temperature", temperature, low=0.0, open_low=True)
        self.temperature = temperature

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        """Return one value per position from `(..., V)` log-probabilities."""
        raise NotImplementedError  # pragma: no cover - abstract

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        temperature = value_at(self.temperature, supervision.progress)
        pair = paired(student.logits, teacher.logits, supervision.mask)
        log_student, log_teacher = (soft_log_probs(logits, temperature=temperature) for logits in pair)
        return masked_mean(self.divergence(log_teacher, log_student), supervision.mask)


class ForwardKL(Divergence):
    """KL(teacher || student): the student must cover everything that the teacher might say.

    Word-level distillation of Kim, Rush (2016), "Sequence-Level Knowledge Distillation", arXiv 1606.07947, section 3.1.
    """

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        return kl(log_teacher, log_student)


class ReverseKL(Divergence):
    """KL(student || teacher): the student must say nothing that the teacher would not.

    Gu, Dong, Wei, Huang (2024), "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543, here for
    each token; best with samples of the student.
    """

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        return kl(log_student, log_teacher)


class GeneralizedJSD(Divergence):
    """Between forward and reverse KL (see `generalized_jsd`).

    Args:
        beta: In [0, 1]: 0 is the forward KL, 1 the reverse, 0.5 the Jensen-Shannon divergence.
        temperature: Softens both distributions; a number or a schedule, more than 0.

    Raises:
        ValueError: `beta` is outside [0, 1].
    """

    def __init__(self, *, beta: float = 0.5, temperature: float | Schedule = 1.0) -> None:
        super().__init__(temperature=temperature)
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must be in [0, 1], not {beta}")
        self.beta = beta

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        return generalized_jsd(log_teacher, log_student, beta=self.beta)


class SkewKL(Divergence):
    """KL(p || alpha * p + (1 - alpha) * q): a forward KL that stays bounded where the student q says "never".

    Ko, Kim, Chen, Yun (2024), "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv 2402.03898,
    section 3.1, with teacher p and student q.

    Args:
        alpha: Share of the teacher in the mixture, in (0, 1).
        temperature: Softens both distributions; a number or a schedule, more than 0.

    Raises:
        ValueError: `alpha` is outside (0, 1).
    """

    def __init__(self, *, alpha: float = 0.1, temperature: float | Schedule = 1.0) -> None:
        super().__init__(temperature=temperature)
        _check_skew(alpha)
        self.alpha = alpha

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        return kl(log_teacher, log_mixture(log_teacher, log_student, share=self.alpha))


class SkewReverseKL(Divergence):
    """KL(q || alpha * q + (1 - alpha) * p): a reverse KL that stays bounded where the teacher p says "never".

    Ko, Kim, Chen, Yun (2024), arXiv 2402.03898, section 3.1.

    Args:
        alpha: Share of the student in the mixture, in (0, 1).
        temperature: Softens both distributions; a number or a schedule, more than 0.

    Raises:
        ValueError: `alpha` is outside (0, 1).
    """

    def __init__(self, *, alpha: float = 0.1, temperature: float | Schedule = 1.0) -> None:
        super().__init__(temperature=temperature)
        _check_skew(alpha)
        self.alpha = alpha

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        return kl(log_student, log_mixture(log_student, log_teacher, share=self.alpha))


def _check_skew(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be in (0, 1), not {alpha}")
