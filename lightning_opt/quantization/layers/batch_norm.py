"""Batch norms: folded into the layer before them, and frozen."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.quantization.ops import along
from lightning_opt.quantization.sites import paused

if TYPE_CHECKING:
    from lightning_opt.quantization.layers.base import QuantizedLayer

_SMALLEST_FACTOR = 1e-12


class FoldableBatchNorm(nn.Module):
    """The behaviour of a batch norm that may be frozen, and may be folded into the layer before it.

    Folding while training is simulated: Krishnamoorthi (2018), "Quantizing deep convolutional networks for efficient
    inference", arXiv 1806.08342, section 3.2.2. The layer rounds its weight times gamma / sigma with the running sigma
    (equations 20 and 21 there), and scales back, so that the norm still sees what it would have seen; once frozen, and
    in eval, the layer does the norm's work with the running statistics and the norm passes on what it is given.

    Attributes:
        frozen: Running statistics are used, and stay as they are, also in training; gamma and beta go on learning.
    """

    prefix = "Quantized"

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    frozen: bool
    layers: "tuple[QuantizedLayer, ...]"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, unless the layer before has done it already; then round, if this is where that is done."""
        with paused():
            return self._normalised(input)

    def _normalised(self, input: Tensor) -> Tensor:
        layer = self.layer
        if layer is not None and layer.folds:
            output = input
        elif self.frozen and self.training:
            output = functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        else:
            output = super().forward(input)
        if layer is None or layer.output_quantizer is None or not layer.is_active:
            return output
        return layer.output_quantizer(output)

    @property
    def layer(self) -> "QuantizedLayer | None":
        """The layer that this norm is folded into."""
        return self.layers[0] if self.layers else None

    @property
    def uses_batch(self) -> bool:
        """Whether it normalises by the statistics of the batch."""
        return self.training and not self.frozen

    def factor(self) -> Tensor:
        """Return gamma / sigma with the running sigma, float32 `(C,)`."""
        sigma = torch.rsqrt(self.running_var.float() + self.eps)
        return sigma if self.weight is None else self.weight.float() * sigma

    def safe_factor(self) -> Tensor:
        """Return the factor without gradient, with 1 in place of what cannot be divided by.

        Rounding to a grid that follows the weight's range gives the same weights whatever the factor is, so that its
        gradient is nothing but noise; gamma learns through the norm itself.
        """
        factor = self.factor().detach()
        return torch.where(factor.abs() < _SMALLEST_FACTOR, torch.ones_like(factor), factor)

    def folded(self, weight: Tensor, bias: Tensor | None, axis: int) -> tuple[Tensor, Tensor]:
        """Return the weight and bias of a layer that also does what this norm does with its running statistics."""
        factor = self.factor()
        mean = -self.running_mean.float() if bias is None else bias.float() - self.running_mean.float()
        moved = mean * factor
        return weight.float() * along(factor, weight, axis), moved if self.bias is None else moved + self.bias.float()


class FoldedBatchNorm(nn.Identity):
    """What is left of a batch norm whose work is part of an integer layer."""


def why_not_folded(norm: nn.Module, layer: nn.Module) -> str | None:
    """Say why a norm cannot be folded into a layer, as one clause; None if it can."""
    if getattr(layer, "transposed", False) and getattr(layer, "groups", 1) > 1:
        return "a transposed convolution with groups mixes the channels of its weight"
    channels = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    if channels is None:
        return "the layer has no output channels"
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return f"it is a {type(norm).__name__}, no batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if norm.num_features != channels:
        return f"it has {norm.num_features} channels, the layer gives {channels}"
    return None
