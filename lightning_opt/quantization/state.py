"""What a model's quantizers do: found by name, switched on and off, observing or frozen."""

from collections.abc import Iterator

import torch
from torch import nn

from lightning_opt.quantization.edits import SwitchOn
from lightning_opt.quantization.layers.base import QuantizedLayer
from lightning_opt.quantization.layers.insertion import make_foldable
from lightning_opt.quantization.layers.integer import IntegerLayer
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.surgery.model_recipe import record


def quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Return the quantizers of `model` by their full names; one that two layers share is there once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}


def weight_quantizers(model: nn.Module) -> Iterator[tuple[QuantizedLayer, FakeQuantizer]]:
    """Yield each layer whose weight is rounded, with the quantizer of its weight."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None:
            yield layer, layer.weight_quantizer


def is_quantized(model: nn.Module) -> bool:
    """Return whether quantizers have been inserted (or weights are integers) in `model`, switched on or not."""
    return any(isinstance(module, FakeQuantizer | IntegerLayer) for module in model.modules())


def is_converted(model: nn.Module) -> bool:
    """Return whether any weight of `model` is of integers."""
    return any(isinstance(module, IntegerLayer) for module in model.modules())


def set_enabled(model: nn.Module, on: bool) -> None:
    """Round values, or leave them as they are."""
    for quantizer in quantizers(model).values():
        quantizer.enabled = on


def set_observing(model: nn.Module, on: bool) -> None:
    """Look for ranges, or keep those that have been found.

    The range of a weight is looked for at each step only if it is that of the smallest and largest value; a costlier
    one is found once, by `switch_on`.
    """
    searched = {quantizer for _, quantizer in weight_quantizers(model) if quantizer.spec is not None}
    for quantizer in quantizers(model).values():
        quantizer.observing = on and quantizer not in searched


@torch.no_grad()
def switch_on(model: nn.Module) -> None:
    """Round values from here on, and write that down in the recipe of `model`.

    Weights that have no range yet get theirs. A quantizer that is not fitted goes on looking for its range; one that
    has been fitted keeps it.
    """
    edit = SwitchOn()
    edit.apply(model)
    for quantizer in quantizers(model).values():
        if not quantizer.is_fitted:
            quantizer.observing = True
            _fit_seen(quantizer)
    for layer, quantizer in weight_quantizers(model):
        if not quantizer.is_fitted:
            quantizer.fit(layer.deployed_weight()[0])
            quantizer.observing = quantizer.spec is None and not quantizer.learnable
    record(model, edit)


@torch.no_grad()
def freeze_observers(model: nn.Module) -> None:
    """Keep all ranges as they are from here on: of weights those of now. Learned ones go on learning."""
    for layer, quantizer in weight_quantizers(model):
        if quantizer.observing and not quantizer.learnable:
            quantizer.fit(layer.deployed_weight()[0])
    for quantizer in quantizers(model).values():
        if quantizer.observing:
            _fit_seen(quantizer)
        quantizer.freeze()


def freeze_batch_norm(model: nn.Module, on: bool = True) -> None:
    """Let every batch norm of `model` use its running statistics and keep them, also in training, or stop that."""
    for norm in list(model.modules()):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            make_foldable(norm).frozen = on


def _fit_seen(quantizer: FakeQuantizer) -> None:
    """Fit a quantizer whose observer has seen something; a learned scale that has begun to learn stays."""
    if quantizer.observer is None or quantizer.dynamic or (quantizer.learnable and quantizer.is_fitted):
        return
    low, high = quantizer.observer.range()
    if bool((high > low).any()):
        quantizer.fit()
