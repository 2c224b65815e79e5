"""Turn rounded weights into integers, and integers back into float weights."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from lightning_opt.quantization.layers.base import QuantizedLayer
from lightning_opt.quantization.layers.batch_norm import FoldableBatchNorm, FoldedBatchNorm
from lightning_opt.quantization.layers.encoder import GuardedEncoderLayer
from lightning_opt.quantization.layers.insertion import QUANTIZERS, remove
from lightning_opt.quantization.layers.integer import IntegerLayer, install, is_same_weight, share
from lightning_opt.quantization.layers.swap import remove_behaviour, replace_behaviour
from lightning_opt.quantization.quantizer import FakeQuantizer


@torch.no_grad()
def to_integers(model: nn.Module) -> None:
    """Replace each rounded weight of `model` by its integers, in place, and keep all grids as they are.

    A batch norm that is folded into a layer becomes part of it. Weights of layers that are tied stay one.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer) and _is_rounded(layer)]
    tied: dict[int, list[tuple[QuantizedLayer, FakeQuantizer]]] = {}
    for layer in layers:
        tied.setdefault(id(layer.weight), []).append((layer, cast(FakeQuantizer, layer.weight_quantizer)))
    for same in tied.values():
        _tie([(_to_integer(layer, quantizer), quantizer) for layer, quantizer in same])
    for quantizer in model.modules():
        if isinstance(quantizer, FakeQuantizer):
            settle(quantizer)
    for norm in model.modules():
        if isinstance(norm, FoldableBatchNorm) and not norm.layers:
            remove_behaviour(norm, FoldableBatchNorm)
            del norm.layers, norm.frozen


def settle(quantizer: FakeQuantizer) -> None:
    """Keep what a quantizer needs to round, and nothing that it needs to find or to learn its range."""
    quantizer.freeze()
    quantizer.observer = None
    if quantizer.learnable:
        scale = quantizer.positive_scale().detach().clone()
        del quantizer.scale
        quantizer.register_buffer("scale", scale)
        quantizer.learnable = quantizer.clip = False


def to_float(model: nn.Module) -> None:
    """Take every quantizer of layers out of `model`, in place; integers become the float weights they stand for."""
    made: dict[int, nn.Parameter] = {}
    for layer in list(model.modules()):
        if isinstance(layer, QuantizedLayer):
            remove(layer)
        elif isinstance(layer, IntegerLayer):
            _to_float(layer, made)
        elif isinstance(layer, GuardedEncoderLayer):
            remove_behaviour(layer, GuardedEncoderLayer)


def _is_rounded(layer: QuantizedLayer) -> bool:
    return layer.weight_quantizer is not None and layer.weight_quantizer.enabled


def _to_integer(layer: QuantizedLayer, quantizer: FakeQuantizer) -> IntegerLayer:
    kind = layer.kind
    weight, bias = layer.deployed_weight()
    if quantizer.observing and not quantizer.learnable:
        quantizer.fit(weight)
    scale = quantizer.positive_scale()
    q = quantizer.int_values(weight)
    for norm in layer.norms:
        _clear(norm)
        norm.__class__ = FoldedBatchNorm  # type: ignore[assignment]
    behaviour, integer = kind.behaviour or QuantizedLayer, kind.integer or IntegerLayer
    del layer.norms, layer._modules["weight_quantizer"]
    install(layer, q=q, scale=scale, zero_point=quantizer.zero_point, bias=bias, grid=quantizer.grid)
    replace_behaviour(layer, behaviour, integer)
    return cast(IntegerLayer, layer)


def _clear(norm: nn.Module) -> None:
    """Leave a norm nothing but what every module has."""
    training = norm.training
    hooks = {name: value for name, value in vars(norm).items() if name.startswith("_") and "hooks" in name}
    vars(norm).clear()
    nn.Module.__init__(norm)
    vars(norm).update(hooks)
    norm.training = training


def _tie(layers: Sequence[tuple[IntegerLayer, FakeQuantizer]]) -> None:
    """Let layers of one weight hold one tensor of integers, those that round it alike."""
    first, its = layers[0]
    same = [layer for layer, quantizer in layers if quantizer is its or is_same_weight(layer, first)]
    for layer in same[1:]:
        share(layer, first)
    for layer in same:
        layer.sharing = tuple(other for other in same if other is not layer)


def _to_float(layer: IntegerLayer, made: dict[int, nn.Parameter]) -> None:
    kind = layer.kind
    weight = made.setdefault(id(layer.stored), nn.Parameter(layer.weight))
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    had_bias = "bias" in layer._buffers
    for name in ("weight", "bias", "weight_scale", "weight_zero_point", "like"):
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    for name in QUANTIZERS:
        layer._modules.pop(name, None)
    for name in ("kind", "weight_grid", "weight_shape", "is_packed", "is_channels_last", "sharing"):
        delattr(layer, name)
    remove_behaviour(layer, kind.integer or IntegerLayer)
    layer.register_parameter("weight", weight)
    if had_bias:
        layer.register_parameter("bias", bias)
