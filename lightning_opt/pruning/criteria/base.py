"""What a criterion of single weights reads and returns.

A criterion never touches a model. It is given one weight and what is known about it besides its values (`Evidence`),
and returns a score for each of its elements: the larger, the more the element is worth keeping.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about one weight besides its values; tensors live on the weight's device.

    Attributes:
        name: The weight's full name in the pruned model.
        gradient: Mean gradient since the last reset, the weight's shape.
        squared_gradient: Mean squared gradient since the last reset, the weight's shape.
        movement: Minus the running sum of gradient times weight, the weight's shape (see `Movement`).
        input_norm: L2 norm of each input of the layer over all rows that were seen: `(in,)` for linear layers,
            `(in * kh * kw,)` for convolutions (in the order of `unfold`: channel, then kernel position; all groups one
            after the other), `(in,)` channels for transposed convolutions, `(rows,)` for embeddings (square root of how
            often each row was looked up).
        gram: `X^T X` of the same inputs `X`, float32: `(in, in)`; `(groups, in / groups, in / groups)` for grouped
            convolutions.
        output_norm: L2 norm of each output feature or channel of the layer, `(out,)`.
        seed: For criteria that draw: the same scores in every process and in every resumed run.
        input_dim: Dimension of the weight that runs over the inputs: 1 for `nn.Linear` and convolutions, 0 for
            embeddings, transposed convolutions and layers that keep their weight as `(in, out)`.
        groups: Groups of a convolution.
    """

    name: str
    gradient: Tensor | None = None
    squared_gradient: Tensor | None = None
    movement: Tensor | None = None
    input_norm: Tensor | None = None
    gram: Tensor | None = None
    output_norm: Tensor | None = None
    seed: int = 0
    input_dim: int = 1
    groups: int = 1

    def require(self, field: str) -> Tensor:
        """Return a piece of evidence that must be there.

        Raises:
            ValueError: It is missing.
        """
        found = getattr(self, field)
        if found is None:
            raise ValueError(
                f"there is no {field} of {self.name}: nothing was observed, or a weight of this kind has none; observe "
                "some batches first, exclude the weight, or choose a criterion that needs no data"
            )
        return found

    def with_weight_shaped(self, change: Callable[[Tensor], Tensor]) -> "Evidence":
        """Return the evidence with each piece that has the weight's shape changed, in a fixed order."""
        names = ("gradient", "squared_gradient", "movement")
        new: dict[str, Any] = {n: change(value) for n in names if (value := getattr(self, n)) is not None}
        return replace(self, **new)


class Criterion(ABC):
    """Base of all scores of single weights; subclasses are frozen dataclasses.

    Attributes:
        needs: Names of the fields of `Evidence` that the criterion reads, so that nothing else is observed.
        compares: Where its authors let weights compete in one-shot pruning: within a layer or within each output.
        elementwise: The score of an element follows from that element of the weight and of the evidence of the weight's
            shape alone; so a part of a sharded weight can be scored by itself.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    compares: ClassVar[Literal["layer", "output"]] = "layer"
    elementwise: ClassVar[bool] = False

    @abstractmethod
    def score(self, weight: Tensor, evidence: Evidence) -> Tensor:
        """Return the worth of each element: the weight's shape, float32, finite, larger = keep.

        Args:
            weight: The weight; its values are read, never changed.
            evidence: What is known about it besides.

        Raises:
            ValueError: A piece of evidence that the criterion needs is missing.
        """


def finite(score: Tensor) -> Tensor:
    """Make a score float32 and finite: NaN counts for nothing, an overflow as the largest number there is."""
    return torch.nan_to_num(score.detach().float(), nan=0.0)


def inputs_like(weight: Tensor, evidence: Evidence) -> Tensor:
    """Spread `evidence.input_norm` over the weight's elements: each gets the norm of the input it multiplies.

    Returns:
        A tensor that broadcasts with `weight`.

    Raises:
        ValueError: The norms are missing or do not fit the weight.
    """
    norm = evidence.require("input_norm").float()
    if evidence.input_dim == 0 and len(norm) == weight.shape[0]:
        return norm.view(-1, *[1] * (weight.dim() - 1))
    inputs = weight[0].numel()
    if evidence.input_dim == 1 and len(norm) == evidence.groups * inputs and weight.shape[0] % evidence.groups == 0:
        per_group = norm.view(evidence.groups, 1, *weight.shape[1:])
        return per_group.expand(-1, weight.shape[0] // evidence.groups, *weight.shape[1:]).reshape(weight.shape)
    raise ValueError(
        f"input_norm of {evidence.name} has {len(norm)} entries, which does not fit a weight of shape "
        f"{tuple(weight.shape)} with {evidence.groups} groups; observe anew after the model's shape has changed"
    )
