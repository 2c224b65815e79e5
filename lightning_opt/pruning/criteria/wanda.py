"""Scores from the weight and the inputs that it meets."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_opt.pruning.criteria.base import Criterion, Evidence, finite, inputs_like


@dataclass(frozen=True)
class Wanda(Criterion):
    """Keep the weights that are large or meet large inputs.

    Sun, Liu, Bair, Kolter (2023), "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695, equation 1: `|W_ij| * ||X_j||_2`. The authors compare within each output
    (`pruning.solvers.prune_with` does). For a convolution `X_j` is a column of its unfolded input, so each kernel
    position has a norm of its own; for an embedding it is the square root of how often the row was looked up.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})
    compares: ClassVar[Literal["layer", "output"]] = "output"

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        return finite(weight.detach().float().abs() * inputs_like(weight, evidence))
