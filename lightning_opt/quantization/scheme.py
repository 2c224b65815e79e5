"""What to quantize and how: one object for the insertion of quantizers, training and conversion."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import MinMax, MovingAverage, Observer, observer_from_dict

_GRIDS = ("weight", "activation", "embedding")
_OBSERVERS = ("weight_observer", "activation_observer")
_FLAGS = ("dynamic", "learnable", "clip", "attention")
_TEXT = re.compile(r"w(?P<w>[2-8])(g(?P<g>\d+))?(a(?P<a>[2-8]))?(?P<dynamic>_dynamic)?(?P<learn>_lsq|_pact)?")
KNOWN_SCHEMES = "w8a8, w4a8, w8a8_dynamic, w8, w4g32 (weights only, groups of 32), w4a4_lsq, w4a4_pact, fp8"

WEIGHT = Grid(bits=8, symmetric=True, signed=True, axis=0)
ACTIVATION = Grid(bits=8, symmetric=False, signed=False, narrow=False)


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """How one layer is quantized.

    Attributes:
        weight: The grid of its weight; None leaves it in float.
        activation: The grid of the values that it reads and gives; None leaves them in float.
        dynamic: The range of what it reads is found anew each time.
        weight_observer: How the weight's range is found.
        activation_observer: How the activations' ranges are found.
        learnable: Scales are learned (LSQ).
        clip: Activations' scales learn from what is clipped (PACT).
        attention: The products of attention are quantized too.
    """

    weight: Grid | None = None
    activation: Grid | None = None
    dynamic: bool = False
    weight_observer: Observer = field(default_factory=MinMax)
    activation_observer: Observer = field(default_factory=MovingAverage)
    learnable: bool = False
    clip: bool = False
    attention: bool = False


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a model is quantized.

    Attributes:
        weight: The grid of weights; None leaves them in float.
        activation: The grid of activations; None leaves them in float (weight only).
        embedding: The grid of embedding tables; None leaves them in float.
        dynamic: The ranges of activations are found anew each time, so that no calibration is needed.
        weight_observer: How the range of a weight is found.
        activation_observer: How the range of an activation is found.
        learnable: Scales are learned: LSQ, Esser et al. (2019), arXiv 1902.08153.
        clip: Scales of activations learn from clipped values only: PACT, Choi et al. (2018), arXiv 1805.06085.
        attention: The matrix products of attention are quantized too.
        rules: Which modules differ: a pattern of module names (`fnmatch`) or `type:ClassName`, to the fields that
            differ, or to None for what stays in float. All that match are applied in order. A grid may be given in
            part: `{"weight": {"bits": 4}}`.

    Raises:
        ValueError: A field of a rule is not known, or values do not go together.
    """

    weight: Grid | None = WEIGHT
    activation: Grid | None = ACTIVATION
    embedding: Grid | None = WEIGHT
    dynamic: bool = False
    weight_observer: Observer = field(default_factory=MinMax)
    activation_observer: Observer = field(default_factory=MovingAverage)
    learnable: bool = False
    clip: bool = False
    attention: bool = False
    rules: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dynamic and self.activation is None:
            raise ValueError("dynamic=True needs a grid for activations; it is None")
        if self.dynamic and (self.learnable or self.clip):
            raise ValueError("dynamic=True: ranges that are found anew each time cannot be learned")
        object.__setattr__(self, "rules", {pattern: _plain_rule(rule) for pattern, rule in self.rules.items()})
        for pattern, rule in self.rules.items():
            if rule is not None:
                _check_rule(self, pattern, rule)

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))

    def layer(self, name: str, module: nn.Module) -> LayerScheme | None:
        """Return how the module `name` is quantized; None if it stays in float."""
        scheme: Scheme | None = self
        for pattern, rule in self.rules.items():
            if _matches(pattern, name, module):
                scheme = None if rule is None else _overridden(scheme or self, rule)
        if scheme is None:
            return None
        is_table = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        weight, activation = (scheme.embedding, None) if is_table else (scheme.weight, scheme.activation)
        if weight is None and activation is None:
            return None
        shared = {name: getattr(scheme, name) for name in (*_OBSERVERS, *_FLAGS)}
        return LayerScheme(
            weight=weight, activation=activation, **{**shared, "dynamic": scheme.dynamic and not is_table}
        )

    def with_rules(self, rules: Mapping[str, Mapping[str, Any] | None]) -> "Scheme":
        """Return a scheme with more rules after its own."""
        own = {pattern: rule for pattern, rule in self.rules.items() if pattern not in rules}
        return dataclasses.replace(self, rules={**own, **rules})

    @property
    def needs_calibration(self) -> bool:
        """Whether ranges of activations have to be found from data before the model can be used."""
        return self.activation is not None and not self.dynamic

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Make a scheme from its short name: `w8a8`, `w4a8`, `w8a8_dynamic`, `w8`, `w4g32`, `w2a8_lsq`, `fp8`.

        Raises:
            ValueError: The name is not known.
        """
        if text == "fp8":
            eight = Grid(dtype="float8_e4m3fn", axis=0)
            return cls(weight=eight, activation=dataclasses.replace(eight, axis=None), embedding=eight)
        found = _TEXT.fullmatch(text)
        if found is None or (found["dynamic"] and not found["a"]) or (found["learn"] == "_pact" and not found["a"]):
            raise ValueError(f"scheme {text!r} is not known; known are {KNOWN_SCHEMES}")
        group_size = int(found["g"]) if found["g"] else None
        weight = dataclasses.replace(WEIGHT, bits=int(found["w"]), group_size=group_size)
        activation = dataclasses.replace(ACTIVATION, bits=int(found["a"])) if found["a"] else None
        return cls(
            weight=weight,
            activation=activation,
            dynamic=bool(found["dynamic"]),
            learnable=found["learn"] == "_lsq",
            clip=found["learn"] == "_pact",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the scheme as plain JSON values."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _FLAGS}
        for name in (*_GRIDS, *_OBSERVERS):
            part = getattr(self, name)
            values[name] = None if part is None else part.to_dict()
        return {**values, "rules": dict(self.rules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scheme":
        """Make the scheme from plain JSON values.

        Raises:
            ValueError: A name is not known or a value is wrong.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a field of a scheme; it has {', '.join(known)}")
        parts: dict[str, Any] = dict(values)
        for name in _GRIDS:
            if isinstance(parts.get(name), Mapping):
                parts[name] = Grid.from_dict(parts[name])
        for name in _OBSERVERS:
            if isinstance(parts.get(name), Mapping | str):
                parts[name] = observer_from_dict(parts[name])
        return cls(**parts)


def _plain_rule(rule: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a rule with its objects as plain values, so that a scheme can be written down."""
    if rule is None:
        return None
    whole = {name: dataclasses.asdict(value) for name, value in rule.items() if isinstance(value, Grid)}
    named = {name: value.to_dict() for name, value in rule.items() if isinstance(value, Observer)}
    return {**rule, **whole, **named}


def _check_rule(scheme: Scheme, pattern: str, rule: Mapping[str, Any]) -> None:
    try:
        _overridden(scheme, rule)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rules[{pattern!r}]: {error}") from error


def _overridden(scheme: Scheme, rule: Mapping[str, Any]) -> Scheme:
    """Return the scheme with the fields of a rule; a grid in part keeps what it does not name."""
    unknown = sorted(set(rule) - {*_GRIDS, *_OBSERVERS, *_FLAGS})
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} cannot be set by a rule; it may set {', '.join((*_GRIDS, *_OBSERVERS, *_FLAGS))}"
        )
    changed: dict[str, Any] = dict(rule)
    for name in _GRIDS:
        if isinstance(changed.get(name), Mapping):
            now = getattr(scheme, name) or (ACTIVATION if name == "activation" else WEIGHT)
            integers = {"dtype": "int"} if "bits" in changed[name] else {}
            changed[name] = Grid.from_dict({**dataclasses.asdict(now), **integers, **changed[name]})
    for name in _OBSERVERS:
        if isinstance(changed.get(name), Mapping | str):
            changed[name] = observer_from_dict(changed[name])
    return dataclasses.replace(scheme, **changed, rules={})


def _matches(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith("type:"):
        return any(kind.__name__ == pattern.removeprefix("type:") for kind in type(module).__mro__)
    return fnmatchcase(name, pattern)
