"""How one layer is quantized, as plain values that can be written down in a recipe."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import Observer, observer_from_dict

_GRIDS = ("weight", "input", "output")
_OBSERVERS = ("weight_observer", "activation_observer")


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is quantized at one layer.

    Attributes:
        weight: Of the weight. An axis means the layer's output channels, whichever axis of the weight those are.
        input: Of the layer's input, where what makes it cannot be quantized there, such as the model's input.
        output: Of the layer's output, or of that of the batch norm that is folded into it.
        batch_norm: Full name of the batch norm that directly follows and is folded into the layer.
        learnable: The steps are trained (LSQ).
        clip: The ranges of activations are trained (PACT).
        dynamic: Ranges of activations are found in each batch anew.
        weight_observer: How the range of the weight is found; None: its smallest and largest value; the least squared
            error where the step is learned.
        activation_observer: How ranges of activations are found; None: their moving average.

    Raises:
        ValueError: A field has another type, or two do not go together.
    """

    weight: Grid | None = None
    input: Grid | None = None
    output: Grid | None = None
    batch_norm: str | None = None
    learnable: bool = False
    clip: bool = False
    dynamic: bool = False
    weight_observer: Observer | None = None
    activation_observer: Observer | None = None

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(_GRIDS, Grid) | dict.fromkeys(_OBSERVERS, Observer) | {"batch_norm": str}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} must be a {kind.__name__} or None; got {str(value)[:80]!r}")
        for name in ("learnable", "clip", "dynamic"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}")
        if self.batch_norm is not None and self.weight is None and self.output is None:
            raise ValueError(f"batch_norm={self.batch_norm!r} needs a weight or an output that is quantized")
        if self.weight is None and self.input is None and self.output is None:
            raise ValueError("a layer's plan must quantize its weight, its input or its output")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, without those that are as usual."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = value.to_dict() if isinstance(value, Grid | Observer) else value
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerPlan":
        """Make the plan from plain values.

        Raises:
            ValueError: A name is not known or a value is wrong.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a layer's plan is an object; got {str(values)[:80]!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not known of a layer's plan; known are {', '.join(known)}")
        made = dict(values)
        for name in _GRIDS:
            if isinstance(made.get(name), Mapping):
                made[name] = Grid.from_dict(made[name])
        for name in _OBSERVERS:
            if isinstance(made.get(name), Mapping | str):
                made[name] = observer_from_dict(made[name])
        return cls(**made)
