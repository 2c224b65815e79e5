"""Scores from the weight alone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_opt.pruning.criteria.base import Criterion, Evidence, finite


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Keep the weights that are large.

    Han, Pool, Tran, Dally (2015), "Learning both Weights and Connections for Efficient Neural Networks",
    arXiv 1506.02626, section 3: `|w|`. For single weights `p` changes nothing but the scale; summed over a structure it
    is the p-th power of the structure's Lp norm.

    Args:
        p: 1 for `|w|`, 2 for `w^2`.

    Raises:
        ValueError: `p` is neither 1 nor 2.

    >>> import torch
    >>> Magnitude().score(torch.tensor([-3.0, 0.5]), Evidence(name="w"))
    tensor([3.0000, 0.5000])
    """

    elementwise: ClassVar[bool] = True

    p: int = 1

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, not {self.p!r}")

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        size = weight.detach().float().abs()
        return finite(size if self.p == 1 else size.square())
