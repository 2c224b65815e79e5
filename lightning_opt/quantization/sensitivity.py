"""Find out what each layer costs: quantize it alone, or all but it, and see how much worse the model becomes."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_opt.evaluation.state import evaluation_mode
from lightning_opt.forward import Inputs, predict
from lightning_opt.quantization.calibration import calibrate, collect
from lightning_opt.quantization.placement import Placement
from lightning_opt.quantization.post_training import post_training_scheme
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import freeze_observers, quantizers, switch_on

Judge: TypeAlias = Callable[[nn.Module], float]
"""Says how much worse a model is than the float model: 0 is as good, more is worse."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What quantizing one layer costs.

    Attributes:
        name: The layer's full name.
        cost: How much worse the model is with this layer quantized alone; or, with all quantized, how much less bad it
            would be without this one.
        params: Elements of its weight.
        weight_bits: Of its weight.
        activation_bits: Of what it reads; None is float.
    """

    name: str
    cost: float
    params: int
    weight_bits: int | None
    activation_bits: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def sensitivity(
    model: nn.Module,
    example_inputs: Inputs,
    scheme: Scheme | str = "w8a8",
    *,
    calibration: Iterable[Any],
    judge: Judge | None = None,
    way: Literal["alone", "all_but"] = "alone",
    exclude: Sequence[str] = (),
) -> list[LayerCost]:
    """Rank the layers of a model by what their quantization costs, the worst first.

    Args:
        model: A trained float model; it stays as it is.
        example_inputs: What `forward` takes.
        scheme: How layers are quantized, or its short name.
        calibration: Batches that ranges are found from.
        judge: Says how much worse a model is, such as `drop_of(evaluate, ...)`; as a rule the divergence of its answers
            to the calibration batches from those of the float model, which tells layers apart where an accuracy on few
            samples cannot.
        way: "alone" quantizes one layer at a time; "all_but" leaves one at a time in float, which also sees how errors
            add up.
        exclude: Patterns of module names that stay in float.

    Raises:
        CalibrationError: There are no calibration data, or they are not finite.
        ConfigError: The model cannot be followed.
        ValueError: `way` is not known.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x = torch.randn(64, 8)
        >>> [row.name for row in sensitivity(net, x[:1], "w2", calibration=[x])]
        ['0', '2']
    """
    if way not in ("alone", "all_but"):
        raise ValueError(f"way={way!r} is not known; it is 'alone' or 'all_but'")
    batches = collect(calibration, example_inputs)
    judge = judge or distance_from(model, batches)
    parts = QuantizedParts(model, example_inputs, scheme, batches=batches, exclude=exclude)
    whole = judge(parts.model) if way == "all_but" else 0.0
    costs = []
    for name in parts.layers:
        with parts.only([name]) if way == "alone" else parts.all_but([name]):
            found = judge(parts.model)
        costs.append(parts.cost(name, found if way == "alone" else whole - found))
    return sorted(costs, key=lambda one: (-one.cost, one.name))


@torch.no_grad()
def distance_from(model: nn.Module, batches: Sequence[Inputs], *, kind: Literal["kl", "mse"] | None = None) -> Judge:
    """Return a judge: how far a model's answers to `batches` are from those of `model`.

    Args:
        model: The float model; it runs once over the batches.
        batches: Inputs.
        kind: "kl": the Kullback-Leibler divergence of the probabilities over the last axis, the mean over positions.
            "mse": the mean squared difference, as a share of the variance of the answers. None: "kl" where the last
            axis has more than one value.
    """
    with evaluation_mode(model):
        wanted = [predict(model, batch).detach() for batch in batches]
    if kind is None:
        kind = "kl" if wanted and wanted[0].dim() > 1 and wanted[0].shape[-1] > 1 else "mse"
    measure = _divergence if kind == "kl" else _squared_share

    @torch.no_grad()
    def judge(other: nn.Module) -> float:
        with evaluation_mode(other):
            found = [predict(other, batch) for batch in batches]
        return measure(wanted, found)

    return judge


def drop_of(evaluate: Callable[[nn.Module], float], *, reference: float, higher_is_better: bool = True) -> Judge:
    """Return a judge: how much a model's metric is below (or above, where less is better) that of the float model."""
    sign = 1.0 if higher_is_better else -1.0
    return lambda model: sign * (reference - float(evaluate(model)))


def _divergence(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    total, positions = 0.0, 0
    for p, q in zip(wanted, found, strict=True):
        log_p, log_q = p.double().log_softmax(dim=-1), q.double().log_softmax(dim=-1)
        each = (log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0)  # a class that both rule out adds nothing
        total += float(each.sum())
        positions += each.numel() // each.shape[-1]
    return total / max(positions, 1)


def _squared_share(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    all_wanted = torch.cat([one.double().flatten() for one in wanted])
    all_found = torch.cat([one.double().flatten() for one in found])
    variance = float(all_wanted.var(correction=0))
    return float((all_wanted - all_found).square().mean()) / (variance or 1.0)


class QuantizedParts:
    """A quantized copy of a model whose layers can be switched one by one.

    Args:
        model: A trained float model; it stays as it is.
        example_inputs: What `forward` takes.
        scheme: How layers are quantized.
        batches: Calibration data.
        exclude: Patterns of module names that stay in float.

    Attributes:
        model: The copy, all of it switched on.
        layers: Full names of the layers that are quantized.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        scheme: Scheme | str,
        *,
        batches: Sequence[Inputs],
        exclude: Sequence[str] = (),
    ) -> None:
        scheme = post_training_scheme(scheme).with_rules(dict.fromkeys(exclude))
        self.scheme = scheme
        self.model = copy.deepcopy(model).eval()
        placement = prepare(self.model, example_inputs, scheme).placement
        if scheme.needs_calibration:
            calibrate(self.model, batches)
        switch_on(self.model)
        freeze_observers(self.model)
        self.layers = tuple(placement.layers)
        self._all = quantizers(self.model)
        self._of = _quantizers_of(placement, self._all)

    def cost(self, name: str, cost: float) -> LayerCost:
        """Describe a layer."""
        layer = self.model.get_submodule(name)
        asked = self.scheme.layer(name, layer)
        weight = getattr(layer, "weight", None)
        return LayerCost(
            name=name,
            cost=cost,
            params=weight.numel() if isinstance(weight, Tensor) else 0,
            weight_bits=asked.weight.bits if asked is not None and asked.weight is not None else None,
            activation_bits=asked.activation.bits if asked is not None and asked.activation is not None else None,
        )

    @contextmanager
    def only(self, names: Iterable[str]) -> Iterator[None]:
        """Quantize nothing but these layers and what they read."""
        wanted = {quantizer for name in names for quantizer in self._of[name]}
        with self._enabled(wanted):
            yield

    @contextmanager
    def all_but(self, names: Iterable[str]) -> Iterator[None]:
        """Leave these layers in float, and what nobody else reads."""
        left = set(names)
        others = {quantizer for name in self.layers if name not in left for quantizer in self._of[name]}
        dropped = {quantizer for name in left for quantizer in self._of[name]} - others
        with self._enabled(set(self._all) - dropped):
            yield

    @contextmanager
    def _enabled(self, names: set[str]) -> Iterator[None]:
        before = {name: quantizer.enabled for name, quantizer in self._all.items()}
        for name, quantizer in self._all.items():
            quantizer.enabled = name in names
        try:
            yield
        finally:
            for name, quantizer in self._all.items():
                quantizer.enabled = before[name]


def _quantizers_of(placement: Placement, found: Mapping[str, FakeQuantizer]) -> dict[str, set[str]]:
    """Return the names of the quantizers of each layer's weight, and of what it reads."""
    names: dict[str, set[str]] = defaultdict(set)
    for path in placement.layers:
        own = {f"{path}.{child}".lstrip(".") for child in ("weight_quantizer", "input_quantizer")}
        names[path] |= own & set(found)
    for where, wants in placement.places.items():
        readers = {step.layer for want in wants for step in want.readers if step.layer}
        for path in readers & set(placement.layers):
            names[path].add(placement.names[where])
    return names
