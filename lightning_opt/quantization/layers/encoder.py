"""Torch's own encoder layers, which have a fast path past the layers inside them."""

from typing import Any

from torch import nn

from lightning_opt.quantization.layers.base import QuantizedLayer
from lightning_opt.quantization.layers.integer import IntegerLayer
from lightning_opt.quantization.layers.swap import add_behaviour
from lightning_opt.quantization.quantizer import FakeQuantizer


class GuardedEncoderLayer(nn.Module):
    """The behaviour of an `nn.TransformerEncoderLayer` that calls its layers wherever one of them rounds or looks.

    In eval and without gradients torch reads the weights of all its layers and computes in one function of its own.
    """

    prefix = "Guarded"

    @property
    def activation_relu_or_gelu(self) -> int:
        """Which activation the fast path is to compute; 0 keeps torch from taking it."""
        if any(isinstance(inside, IntegerLayer) or _is_at_work(inside) for inside in self.modules()):
            return 0
        value: int = vars(self)["activation_relu_or_gelu"]
        return value


def guard_encoder_layers(model: nn.Module) -> None:
    """Guard each encoder layer of `model` that holds a quantized layer."""
    for module in [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]:
        if any(isinstance(inside, QuantizedLayer) for inside in module.modules()):
            add_behaviour(module, GuardedEncoderLayer)


def _is_at_work(module: Any) -> bool:
    return isinstance(module, FakeQuantizer) and (module.enabled or module.observing)
