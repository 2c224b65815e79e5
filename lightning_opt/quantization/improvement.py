"""What an improvement of post-training quantization is: an object with one method, applied at one of two moments.

Before quantizers are inserted, float weights may be changed into others that give the same answers and are easier to
round. After calibration, weights are moved onto their grids in a better way than one by one, and biases corrected; the
grid of each such weight is fixed then, so that conversion finds exactly the integers that were chosen.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_opt.forward import Inputs


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A layer that an improvement leaves as it is.

    Attributes:
        path: The layer's full name.
        why: One clause, such as "its output is also read by relu".
    """

    path: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an improvement did.

    Attributes:
        changed: Full names of the layers whose weights or biases it changed.
        refused: Layers that it looked at and left alone.
    """

    changed: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()


def first_reasons(refused: Sequence[Refused], *, count: int = 3) -> str:
    """Return why the first few layers were left alone, for an error where nothing is left."""
    reasons = "; ".join(f"{one.path}: {one.why}" for one in refused[:count])
    return reasons or "no layer is of the kind that it works on"


class FloatImprovement(ABC):
    """Changes a float model before quantizers are inserted; the model's answers stay what they are, up to rounding.

    Changed weights are not structure, so a recipe knows nothing of them.
    """

    @abstractmethod
    def improve(self, model: nn.Module, batches: Sequence[Inputs]) -> Outcome:
        """Change `model` in place.

        Args:
            model: A float model.
            batches: Inputs to calibrate on.

        Raises:
            ConfigError: There is nothing in this model that could be improved.
        """


class QuantizedImprovement(ABC):
    """Changes weights or biases of a prepared and calibrated model whose quantizers are switched on."""

    @abstractmethod
    def improve(self, model: nn.Module, batches: Sequence[Inputs], *, reference: nn.Module | None = None) -> Outcome:
        """Change `model` in place.

        Args:
            model: A prepared, calibrated model, switched on.
            batches: Inputs to calibrate on.
            reference: A copy of the model from before any improvement of this kind, switched off: what answers should
                be. None: `model` itself as it is now, switched off.

        Raises:
            ConfigError: There is nothing in this model that could be improved.
        """
