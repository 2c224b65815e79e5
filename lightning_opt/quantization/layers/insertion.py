"""Put quantizers into a layer, and take them out again."""

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers.base import LayerKind, QuantizedLayer, handler
from lightning_opt.quantization.layers.batch_norm import FoldableBatchNorm
from lightning_opt.quantization.layers.plan import LayerPlan
from lightning_opt.quantization.layers.swap import add_behaviour, remove_behaviour
from lightning_opt.quantization.observers import MSE, MinMax, MovingAverage, Observer
from lightning_opt.quantization.quantizer import FakeQuantizer

QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")


def insert(layer: nn.Module, plan: LayerPlan, norm: nn.Module | None = None) -> None:
    """Quantize `layer` as `plan` says, in place and switched off.

    Args:
        layer: One that `refusal` has nothing against.
        plan: What is quantized.
        norm: The batch norm that is folded into it, one that `why_not_folded` has nothing against.
    """
    kind = cast(LayerKind, handler(layer))
    weight = cast(Tensor, layer.weight)
    inside = None if plan.weight is None else _weight_quantizer(plan, weight, kind)
    made = (inside, _activation_quantizer(plan.input, plan), _activation_quantizer(plan.output, plan))
    for name, quantizer in zip(QUANTIZERS, made, strict=True):
        layer.register_module(name, quantizer)
        if quantizer is not None:
            quantizer.to(weight.device).train(layer.training)
    add_behaviour(layer, kind.behaviour or QuantizedLayer)
    layer.kind = kind  # type: ignore[assignment]
    layer.norms = () if norm is None else (make_foldable(norm),)  # type: ignore[assignment]
    if norm is not None:
        norm.layers = (layer,)  # type: ignore[assignment]


def remove(layer: QuantizedLayer) -> None:
    """Make `layer` what it was before `insert`; its batch norm as well."""
    kind = layer.kind
    for norm in layer.norms:
        remove_behaviour(norm, FoldableBatchNorm)
        del norm.layers, norm.frozen
    for name in QUANTIZERS:
        del layer._modules[name]
    del layer.kind, layer.norms
    remove_behaviour(layer, kind.behaviour or QuantizedLayer)


def make_foldable(norm: nn.Module) -> FoldableBatchNorm:
    """Give a batch norm the behaviour of one that can be folded and frozen."""
    if not isinstance(norm, FoldableBatchNorm):
        add_behaviour(norm, FoldableBatchNorm)
        norm.frozen, norm.layers = False, ()  # type: ignore[assignment]
    return cast(FoldableBatchNorm, norm)


def activation_quantizer(
    grid: Grid,
    *,
    observer: Observer | None = None,
    learnable: bool = False,
    clip: bool = False,
    dynamic: bool = False,
) -> FakeQuantizer:
    """Return the quantizer of a value that the network computes, switched off and not observing."""
    learns = not dynamic and not grid.is_float
    made = FakeQuantizer(
        grid,
        observer=None if dynamic else observer or MovingAverage(),
        learnable=learnable and learns,
        clip=clip and learns,
        dynamic=dynamic,
    )
    made.observing = False
    return made


def _activation_quantizer(grid: Grid | None, plan: LayerPlan) -> FakeQuantizer | None:
    if grid is None:
        return None
    return activation_quantizer(
        grid, observer=plan.activation_observer, learnable=plan.learnable, clip=plan.clip, dynamic=plan.dynamic
    )


def _weight_quantizer(plan: LayerPlan, weight: Tensor, kind: LayerKind) -> FakeQuantizer:
    grid = cast(Grid, plan.weight)
    if grid.axis is not None:
        grid = replace(grid, axis=kind.axis)
    search = None if isinstance(plan.weight_observer, MinMax) else plan.weight_observer
    if search is None and plan.learnable and not grid.is_float:
        search = MSE(steps=40)  # a step that learns starts where the weight is changed the least
    channels = grid.channels(weight)
    made = FakeQuantizer(grid, observer=search, learnable=plan.learnable and not grid.is_float, channels=channels)
    made.observer = None  # a weight is there to be looked at: nothing about it has to be remembered
    made.observing = False
    return made
