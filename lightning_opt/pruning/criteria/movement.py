"""Scores that are learned: where a weight has been going, not where it is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_opt.pruning.criteria.base import Criterion, Evidence, finite


@dataclass(frozen=True)
class Movement(Criterion):
    """Keep the weights that training moves away from zero.

    Sanh, Wolf, Rush (2020), "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683, equation 5: the
    score is minus the sum over steps of `dL/dw * w`. It is what gradient descent makes of scores that multiply the
    weights through a straight-through mask (equations 2 and 3) at learning rate 1; the rate itself changes no order.

    In the paper a masked weight keeps its value behind the mask, and its score goes on moving with that value and the
    gradient at the masked place. Here masked weights are zero in the model. PyTorch still gives the gradient there, and
    `Statistics` keeps the value that each weight had at the last backward before it was zeroed, so the score goes on
    moving as in the paper and a masked weight can be chosen again. What differs:

    * a masked weight's value stands still, as it does in the paper with hard masks, but a weight that is chosen again
      starts at zero unless the caller writes `Statistics.last_value(name)` back;
    * where gradients are masked as well (`Masks.mask_gradients`), the score of a masked weight stands still and it
      comes back only when others fall below it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"movement"})
    elementwise: ClassVar[bool] = True

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        return finite(evidence.require("movement"))


@dataclass(frozen=True)
class SoftMovement(Criterion):
    """Keep the weights whose score is above a threshold; how many that are is learned.

    Sanh, Wolf, Rush (2020), arXiv 2005.07683, section 4, soft movement pruning: `sigmoid(scale * S)` is compared with a
    threshold, and a regularizer `strength * sum(sigmoid(scale * S))` pulls all scores down, so that the sparsity
    follows from the strength. `Statistics.of(...)` reads `strength` and `scale` and pulls as it accumulates; `kept` is
    the learned mask. `score` is what the sigmoid is taken of (large scores would saturate and tie), for allocations
    that want a certain sparsity; its order differs from `Movement`'s by the pull alone.

    Args:
        threshold: Least sigmoid of a score that is kept, in (0, 1).
        strength: Weight of the regularizer at each step, 0 or more.
        scale: Steepness of the sigmoid, more than 0.

    Raises:
        ValueError: An argument is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"movement"})
    elementwise: ClassVar[bool] = True

    threshold: float = 0.5
    strength: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, not {self.threshold}")
        if not self.strength >= 0.0:
            raise ValueError(f"strength must be at least 0, not {self.strength}")
        if not self.scale > 0.0:
            raise ValueError(f"scale must be more than 0, not {self.scale}")

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        return finite(self.scale * evidence.require("movement").float())

    def kept(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """Return the learned mask, bool of the weight's shape: True where the score is above the threshold."""
        return torch.sigmoid(self.score(weight, evidence)) > self.threshold

    def penalty(self, movements: Iterable[Tensor]) -> Tensor:
        """Return the regularizer's value: `strength` times the sum of all sigmoids.

        Args:
            movements: The scores `S` of all weights (`Evidence.movement`).
        """
        sums = [torch.sigmoid(self.scale * movement.float()).sum() for movement in movements]
        return self.strength * torch.stack(sums).sum()
