"""What every quantized layer has in common, whatever kind of layer it is.

A layer is quantized in place: its class becomes a subclass, and up to three quantizers become its children. Its
parameters stay the same objects under the same names. Switched off it computes what it always did, and nothing more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, cast

from torch import Tensor, nn

from lightning_opt.quantization import sites
from lightning_opt.quantization.functional import fake_quantize, lsq, scale_and_zero_point
from lightning_opt.quantization.layers.batch_norm import FoldableBatchNorm
from lightning_opt.quantization.layers.swap import plain_class
from lightning_opt.quantization.observers import MinMax
from lightning_opt.quantization.ops import along
from lightning_opt.quantization.quantizer import FakeQuantizer


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """How layers of one class compute, so that they can do it with other weights.

    The class holds its weight as the parameter `weight`, and its bias, if any, as the parameter `bias`.

    Attributes:
        name: Such as "convolution", for reports.
        layer: The class whose `forward` is replaced.
        compute: `(module, input, weight, bias, *other arguments of forward)` -> what `forward` returns.
        axis: The axis of the weight that runs along the output channels.
        behaviour: What is put on top of the class: `QuantizedLayer` (as is None), or a subclass that does more.
        integer: What takes its place once the weight is of integers: `IntegerLayer` (as is None), or a subclass.
    """

    name: str
    layer: type[nn.Module]
    compute: Callable[..., Any]
    axis: int = 0
    behaviour: "type[QuantizedLayer] | None" = None
    integer: type[nn.Module] | None = None


@singledispatch
def handler(module: nn.Module) -> LayerKind | None:
    """Return how a layer is quantized; None for a class that is not known.

    Your own layers are added from outside, with `@handler.register`.

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(4))
        ...
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @handler.register
        ... def _(module: Scale):
        ...     return LayerKind(name="scale", layer=Scale, compute=lambda module, x, weight, bias: x * weight)
        >>> refusal(Scale()) is None
        True
    """
    return next((kind for kind in (find(module) for find in LOOKUPS) if kind is not None), None)


LOOKUPS: list[Callable[[nn.Module], LayerKind | None]] = []
"""For classes of packages that are not imported before one of their objects is met."""


def refusal(module: nn.Module) -> str | None:
    """Say why a layer cannot be quantized, as one clause; None if it can."""
    kind, plain = handler(module), plain_class(module)
    if kind is None:
        return f"{plain.__name__} is no kind of layer that is known; register a handler for it"
    if plain.forward is not kind.layer.forward or "forward" in vars(module):
        return f"{plain.__name__} has a forward of its own; register a handler for it"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (it is parametrized, pruned by torch, or not there)"
    if nn.parameter.is_lazy(weight):
        return "its weight is not yet initialised"
    if not weight.is_floating_point() or weight.numel() == 0:
        return f"its weight is {tuple(weight.shape)} of {weight.dtype}"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm changes its weight while it computes"
    return None


class QuantizedLayer(nn.Module):
    """The behaviour of a layer whose weight, input or output is quantized.

    Attributes:
        weight_quantizer: Of the weight, after the batch norm has been folded into it if there is one.
        input_quantizer: Of the layer's input.
        output_quantizer: Of the layer's output, or of that of the batch norm that follows.
    """

    prefix = "Quantized"

    weight_quantizer: FakeQuantizer | None
    input_quantizer: FakeQuantizer | None
    output_quantizer: FakeQuantizer | None
    kind: LayerKind
    norms: tuple[FoldableBatchNorm, ...]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute as the layer does, with rounded values where that is switched on."""
        with sites.paused():  # what a layer computes is no call of the owner around, also while it is switched off
            if not self.is_active:
                return super().forward(input, *args, **kwargs)
            if self.input_quantizer is not None:
                input = self.input_quantizer(input)
            output = self.answer(input, *args, **kwargs)
            if self.output_quantizer is not None and not self.norms:
                output = self.output_quantizer(output)
            return output

    def answer(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute with the rounded weight, or with the weight as it is while that is switched off."""
        if self.weight_quantizer is None or not self.weight_quantizer.enabled:
            return super().forward(input, *args, **kwargs)
        weight, bias = self.rounded_weight(self.weight_quantizer)
        return self.kind.compute(self, input, weight, bias, *args, **kwargs)

    @property
    def is_active(self) -> bool:
        """Whether anything is rounded or looked at."""
        if self.weight_quantizer is not None and self.weight_quantizer.enabled:
            return True
        return any(q is not None and (q.enabled or q.observing) for q in (self.input_quantizer, self.output_quantizer))

    @property
    def norm(self) -> FoldableBatchNorm | None:
        """The batch norm that is folded into this layer; it stays a child of whatever holds it."""
        return self.norms[0] if self.norms else None

    @property
    def folds(self) -> bool:
        """Whether the layer does the batch norm's work now: always in eval, in training once that is frozen."""
        on = self.weight_quantizer is not None and self.weight_quantizer.enabled
        return on and self.norm is not None and not self.norm.uses_batch

    def rounded_weight(self, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias to compute with."""
        weight, bias, norm = cast(Tensor, self.weight), self.bias_or_none, self.norm
        if norm is None:
            return _rounded(quantizer, weight), bias
        if norm.uses_batch:
            factor = along(norm.safe_factor(), weight, self.kind.axis)
            return (_rounded(quantizer, weight.float() * factor) / factor).to(weight.dtype), bias
        folded, moved = norm.folded(weight, bias, self.kind.axis)
        return _rounded(quantizer, folded).to(weight.dtype), moved.to(weight.dtype)

    def deployed_weight(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of the layer in eval, before rounding."""
        weight, bias = cast(Tensor, self.weight), self.bias_or_none
        if self.norm is None:
            return weight, bias
        folded, moved = self.norm.folded(weight, bias, self.kind.axis)
        return folded, moved.to(weight.dtype)

    @property
    def bias_or_none(self) -> Tensor | None:
        """The bias, if the layer has one."""
        return getattr(self, "bias", None)


def _rounded(quantizer: FakeQuantizer, weight: Tensor) -> Tensor:
    """Round a weight; until it is frozen its grid follows it, also from the last step of training to an evaluation."""
    if quantizer.training or not (quantizer.observing or quantizer.learnable):
        rounded: Tensor = quantizer(weight)
        return rounded
    if quantizer.learnable:
        return lsq(weight, quantizer.positive_scale(), quantizer.zero_point, quantizer.grid)
    scale, zero_point = scale_and_zero_point(*MinMax().of(weight, quantizer.grid), quantizer.grid)
    return fake_quantize(weight, scale, zero_point, quantizer.grid, is_covered=True)
