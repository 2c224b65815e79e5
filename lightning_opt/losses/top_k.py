"""A teacher that is known only by its likeliest classes and the mass of all others, as a cache keeps it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_opt.losses.divergence import kl, soft_log_probs
from lightning_opt.losses.schedules import Schedule
from lightning_opt.losses.sequence import Divergence


class TopK(NamedTuple):
    """The part of a distribution that a cache keeps.

    Attributes:
        indices: `(..., K)` int64 classes, the likeliest first.
        log_probs: `(..., K)` their log-probabilities.
        tail_log_mass: `(...)` log of the probability of all other classes together.
    """

    indices: Tensor
    log_probs: Tensor
    tail_log_mass: Tensor


def top_k_of(logits: Tensor, *, k: int, temperature: float = 1.0) -> TopK:
    """Keep the `k` likeliest classes of `(..., V)` logits and the mass of the rest.

    Raises:
        ValueError: `k` is not in [1, V].
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be in [1, {logits.shape[-1]}], the number of classes, not {k}")
    log_p = soft_log_probs(logits, temperature=temperature)
    kept, indices = log_p.topk(k, dim=-1)
    # Adding up the rest is exact where 1 minus the kept mass would round to 0.
    tail = log_p.scatter(-1, indices, -torch.inf).logsumexp(dim=-1)
    return TopK(indices, kept, tail)


def expand_top_k(top_k: TopK, *, num_classes: int) -> Tensor:
    """Return `(..., V)` log-probabilities that agree with `top_k`, the tail spread evenly over the other classes.

    They serve as logits for every loss. `top_k_of` gives back what went in; only the tail's inside is made up.
    """
    others = max(num_classes - top_k.indices.shape[-1], 1)
    each = top_k.tail_log_mass - math.log(others)
    full = each.unsqueeze(-1).expand(*each.shape, num_classes)
    return full.scatter(-1, top_k.indices, top_k.log_probs.to(full.dtype))


def top_k_kl(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail_log_mass: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Return the forward KL over K classes and one more that stands for all others.

    Lumping the others keeps their total where the teacher has it. Dropping them and rescaling the rest would be biased,
    as Anshumann and others (2025), "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", arXiv
    2503.16870, show. It is never more than the full forward KL, and equals it with K = V.

    Args:
        student_logits: `(..., V)`.
        indices: `(..., K)` int64 classes that the teacher's part names.
        log_probs: `(..., K)` the teacher's log-probabilities of them, taken at the same temperature.
        tail_log_mass: `(...)` log of the teacher's probability of all other classes.
        temperature: Softens the student.

    Returns:
        `(...)`, one value per position.
    """
    mine = soft_log_probs(student_logits, temperature=temperature)
    tail = mine.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    mine = torch.cat([mine.gather(-1, indices), tail], dim=-1)
    theirs = torch.cat([log_probs, tail_log_mass.unsqueeze(-1)], dim=-1).detach().to(mine.dtype)
    return kl(theirs, mine)


class TopKKL(Divergence):
    """The forward KL that a cached teacher allows: its K likeliest classes and the mass of the rest (see `top_k_kl`).

    With a live teacher it gives what the cache would give: at temperature 1, logits made by `expand_top_k` lead to the
    same value.

    Args:
        k: How many classes are kept, at least 1 and at most the vocabulary.
        temperature: Softens both distributions; a number or a schedule, more than 0.

    Raises:
        ValueError: `k` is smaller than 1.
    """

    def __init__(self, *, k: int = 64, temperature: float | Schedule = 1.0) -> None:
        super().__init__(temperature=temperature)
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        self.k = k

    def divergence(self, log_teacher: Tensor, log_student: Tensor) -> Tensor:
        # Log-probabilities are their own logits, so they can be handed on as such.
        return top_k_kl(log_student, *top_k_of(log_teacher, k=self.k))
