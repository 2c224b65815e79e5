"""Quantization as edits of a recipe: what is inserted where, that it is switched on, and that weights are integers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers.base import QuantizedLayer, refusal
from lightning_opt.quantization.layers.batch_norm import FoldableBatchNorm, why_not_folded
from lightning_opt.quantization.layers.conversion import to_integers
from lightning_opt.quantization.layers.encoder import guard_encoder_layers
from lightning_opt.quantization.layers.insertion import activation_quantizer, insert
from lightning_opt.quantization.layers.integer import IntegerLayer
from lightning_opt.quantization.layers.plan import LayerPlan
from lightning_opt.quantization.observers import observer_from_dict
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.sites import CHILD, swap_owner
from lightning_opt.surgery.edits import Edit


@dataclass(frozen=True)
class QuantizeEdit(Edit):
    """Insert quantizers, switched off: the model computes what it did.

    Attributes:
        layers: `{full module name: a `LayerPlan` or its plain values}`.
        sites: `{full name of the owner: [[function, how many-th call, {"grid": ..., "observer": ...}], ...]}`, see
            `sites`; the values of a grid alone will do.
        scheme: The plain values of the scheme that this follows from.
    """

    op: ClassVar[str] = "quantize"

    layers: Mapping[str, Any]
    sites: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    scheme: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("layers", "sites", "scheme"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be an object; got {str(getattr(self, name))[:80]!r}")
        object.__setattr__(self, "layers", {path: _plan(path, plan).to_dict() for path, plan in self.layers.items()})
        object.__setattr__(self, "sites", {path: _sites(path, sites) for path, sites in self.sites.items()})

    def __hash__(self) -> int:
        return hash((self.op, tuple(sorted(self.layers)), tuple(sorted(self.sites))))

    @property
    def plans(self) -> dict[str, LayerPlan]:
        """How each layer is quantized."""
        return {path: LayerPlan.from_dict(plan) for path, plan in self.layers.items()}

    def apply(self, model: nn.Module) -> nn.Module:
        found = list(self._found(model))
        owners = [(path, _module(model, path, "sites"), sites) for path, sites in self.sites.items()]
        norms = {plan.batch_norm for plan in self.plans.values()} & set(self.sites)
        if norms:
            raise ValueError(f"sites: {min(map(str, norms))!r} is folded into a layer; quantize the layer's output")
        for layer, plan, norm in found:
            insert(layer, plan, norm)
        _share_quantizers([layer for layer, _, _ in found])
        guard_encoder_layers(model)
        for path, owner, sites in owners:
            try:
                swap_owner(owner, sites, make=_site_quantizer)
            except ValueError as error:
                raise ValueError(f"sites of {path!r}: {error}") from error
            _settle(owner)
        return model

    def under(self, path: str) -> "QuantizeEdit":
        layers = {_join(path, name): dict(plan) for name, plan in self.layers.items()}
        for plan in layers.values():
            if plan.get("batch_norm") is not None:
                plan["batch_norm"] = _join(path, plan["batch_norm"])
        return QuantizeEdit(layers, {_join(path, name): sites for name, sites in self.sites.items()}, self.scheme)

    def _found(self, model: nn.Module) -> Iterator[tuple[nn.Module, LayerPlan, nn.Module | None]]:
        """Find each layer and its batch norm, and make sure that they can be quantized; change nothing."""
        folded: dict[int, str] = {}
        for path, plan in self.plans.items():
            layer = _module(model, path, "layers")
            why = "it is quantized already" if isinstance(layer, QuantizedLayer | IntegerLayer) else refusal(layer)
            if why is not None:
                raise ValueError(f"layers: {path!r} ({type(layer).__name__}) cannot be quantized: {why}")
            norm = None
            if plan.batch_norm is not None:
                norm = _module(model, plan.batch_norm, f"batch_norm of {path!r}")
                why = _why_not_folded(norm, layer, folded.setdefault(id(norm), path) != path)
                if why is not None:
                    raise ValueError(f"layers: {plan.batch_norm!r} cannot be folded into {path!r}: {why}")
            yield layer, plan, norm


@dataclass(frozen=True)
class SwitchOn(Edit):
    """Switch quantizers on; weights' scales take the number of channels that the weights have by now.

    Attributes:
        path: The module whose quantizers are meant; "" is the model itself.
    """

    op: ClassVar[str] = "quantize_on"

    path: str = ""

    def apply(self, model: nn.Module) -> nn.Module:
        inside = _module(model, self.path, "path")
        for layer in inside.modules():
            if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None:
                weight, quantizer = layer.weight, layer.weight_quantizer
                quantizer.resize(quantizer.grid.channels(weight))  # type: ignore[arg-type]
        for module in inside.modules():
            if isinstance(module, FakeQuantizer):
                module.enabled = True
        return model

    def under(self, path: str) -> "SwitchOn":
        return SwitchOn(_join(path, self.path))


@dataclass(frozen=True)
class Convert(Edit):
    """Put integers in place of the weights whose quantizers are switched on, and keep all grids as they are.

    Attributes:
        path: The module that is converted; "" is the model itself.
    """

    op: ClassVar[str] = "convert"

    path: str = ""

    def apply(self, model: nn.Module) -> nn.Module:
        to_integers(_module(model, self.path, "path"))
        return model

    def under(self, path: str) -> "Convert":
        return Convert(_join(path, self.path))


def _plan(path: str, plan: Any) -> LayerPlan:
    try:
        return plan if isinstance(plan, LayerPlan) else LayerPlan.from_dict(plan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layers: {path!r}: {error}") from error


def _sites(path: str, sites: Any) -> list[list[Any]]:
    if not isinstance(sites, list | tuple) or not all(isinstance(site, list | tuple) for site in sites):
        raise ValueError(f"sites of {path!r} must be lists [function, number, grid]; got {str(sites)[:80]}")
    found = []
    for site in sites:
        if len(site) != 3 or not isinstance(site[2], Mapping):
            raise ValueError(f"sites of {path!r}: a site is [function, number, grid]; got {str(site)[:80]}")
        values = dict(site[2]) if "grid" in site[2] else {"grid": dict(site[2])}
        try:
            _site_quantizer(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"sites of {path!r}: {error}") from error
        found.append([site[0], site[1], values])
    return found


def _site_quantizer(values: Mapping[str, Any]) -> FakeQuantizer:
    unknown = sorted(set(values) - {"grid", "observer", "learnable", "clip", "dynamic"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not known; known are grid, observer, learnable, clip, dynamic")
    observer = values.get("observer")
    return activation_quantizer(
        Grid.from_dict(values["grid"]),
        observer=None if observer is None else observer_from_dict(observer),
        learnable=values.get("learnable", False),
        clip=values.get("clip", False),
        dynamic=values.get("dynamic", False),
    )


def _module(model: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{where}: {path!r} names no module of {type(model).__name__}") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _why_not_folded(norm: nn.Module, layer: nn.Module, is_taken: bool) -> str | None:
    if is_taken or (isinstance(norm, FoldableBatchNorm) and norm.layers):
        return "it is folded into another layer"
    return why_not_folded(norm, layer)


def _share_quantizers(layers: Sequence[nn.Module]) -> None:
    """Give layers that are tied by their weight one quantizer of it, so that they stay tied as integers."""
    first: dict[tuple[Any, ...], FakeQuantizer] = {}
    for layer in layers:
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, FakeQuantizer) and not layer.norms:
            key = (id(layer.weight), quantizer.grid, quantizer.spec, quantizer.learnable)
            layer._modules["weight_quantizer"] = first.setdefault(key, quantizer)


def _settle(owner: nn.Module) -> None:
    """Bring the quantizers of an owner to its device and mode."""
    tensor = next(iter((*owner.parameters(), *owner.buffers())))
    owner.get_submodule(CHILD).to(tensor.device).train(owner.training)
