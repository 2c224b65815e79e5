"""Scores from the weight and its gradient: what the loss would change by without the weight, to first order."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_opt.pruning.criteria.base import Criterion, Evidence, finite


@dataclass(frozen=True)
class Snip(Criterion):
    """Keep the weights to whose presence the loss is sensitive.

    Lee, Ajanthan, Torr (2019), "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv 1810.02340,
    equation 5: `|g * w|` with the mean gradient. The authors divide by the sum over the whole network, which changes no
    order and is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    elementwise: ClassVar[bool] = True

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        return finite((evidence.require("gradient").float() * weight.detach().float()).abs())


@dataclass(frozen=True)
class Taylor(Criterion):
    """Keep the weights whose removal changes the loss of a batch most, whichever way.

    Molchanov, Mallya, Tyree, Frosio, Kautz (2019), "Importance Estimation for Neural Network Pruning",
    arXiv 1906.10771, equation 8: `(g * w)^2`, averaged over batches (section 3.2), so it reads the mean *squared*
    gradient: where the gradients of batches cancel out, Snip sees nothing and Taylor does.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"squared_gradient"})
    elementwise: ClassVar[bool] = True

    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        return finite(evidence.require("squared_gradient").float() * weight.detach().float().square())
