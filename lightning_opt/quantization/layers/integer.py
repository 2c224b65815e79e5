"""Layers whose weights are integers."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_opt.quantization.functional import dequantize
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers.base import LayerKind
from lightning_opt.quantization.packing import pack, packed_bits, unpack
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.sites import paused


class IntegerLayer(nn.Module):
    """The behaviour of a layer that holds its weight as integers, and turns them into numbers while it computes.

    No other copy of the weight is kept. In the state, `weight` is int8 or uint8, shaped as ever; float8 for such a
    grid; below 5 bits it is uint8 `(rows, bytes)`.

    Attributes:
        weight_scale: float32 `(n,)`.
        weight_zero_point: int32 `(n,)`; part of the state only where it depends on the data.
        bias: float, or None.
        like: Only without a bias: empty, of the dtype that the layer was of.
    """

    prefix = "Integer"

    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    like: Tensor
    kind: LayerKind
    input_quantizer: FakeQuantizer | None
    output_quantizer: FakeQuantizer | None
    weight_grid: Grid
    weight_shape: tuple[int, ...]
    is_packed: bool
    is_channels_last: bool
    sharing: "tuple[IntegerLayer, ...]"

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute as the layer does, with the weight that the integers stand for."""
        with paused():
            if self.input_quantizer is not None:
                input = self.input_quantizer(input)
            output = self.answer(input, *args, **kwargs)
            return output if self.output_quantizer is None else self.output_quantizer(output)

    def answer(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute with the weight that the integers stand for."""
        return self.kind.compute(self, input, self.float_weight().to(input.dtype), self.bias, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, made anew: for code around the layer that reads it or its dtype."""
        return self.float_weight().to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer was of, and a table answers with."""
        return (self.like if self.bias is None else self.bias).dtype

    @property
    def stored(self) -> Tensor:
        """The integers as they are kept."""
        return cast(Tensor, self._buffers["weight"])

    def int_weight(self) -> Tensor:
        """Return the integers, one an element, in the shape of the weight."""
        if not self.is_packed:
            return self.stored
        whole = unpack(self.stored, self.weight_grid, self.weight_shape[1:])
        return whole.contiguous(memory_format=torch.channels_last) if self.is_channels_last else whole

    def float_weight(self) -> Tensor:
        """Return the float32 weight that the integers stand for."""
        return dequantize(self.int_weight(), self.weight_scale, self.weight_zero_point, self.weight_grid)

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerLayer":
        super()._apply(fn, recurse)
        for other in self.sharing:  # a move would leave each with a copy of its own
            if other.stored.device == self.stored.device and other.weight_scale.dtype == self.weight_scale.dtype:
                share(other, self)
        return self


_SHARED = ("weight", "weight_scale", "weight_zero_point")


def share(layer: IntegerLayer, other: IntegerLayer) -> None:
    """Let `layer` hold the very integers and scales of `other`."""
    for name in (*_SHARED, "like"):
        if name in layer._buffers and name in other._buffers:
            layer._buffers[name] = other._buffers[name]


def is_same_weight(layer: IntegerLayer, other: IntegerLayer) -> bool:
    """Tell whether two layers hold equal integers with equal scales, read in the same way."""
    if (layer.weight_grid, layer.weight_shape) != (other.weight_grid, other.weight_shape):
        return False
    return all(torch.equal(layer._buffers[name], other._buffers[name]) for name in _SHARED)  # type: ignore[arg-type]


def install(layer: nn.Module, *, q: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, grid: Grid) -> None:
    """Put integers in place of a layer's weight, and a plain tensor in place of its bias.

    Args:
        layer: Of any class; what it held as `weight` and `bias` goes.
        q: The integers, in the shape of the weight.
        scale: `(n,)`.
        zero_point: int32 `(n,)`.
        bias: As the layer computes with it.
        grid: What the integers are of.
    """
    weight = cast(Tensor, layer.weight)
    for name in ("weight", "bias"):
        layer._parameters.pop(name, None)
    if bias is None:
        layer.register_buffer("like", torch.empty(0, dtype=weight.dtype, device=q.device))
    channels_last = q.dim() == 4 and not q.is_contiguous() and q.is_contiguous(memory_format=torch.channels_last)
    layer.register_buffer("weight", pack(q, grid))
    layer.register_buffer("bias", None if bias is None else bias.detach().clone())
    layer.register_buffer("weight_scale", scale.detach().clone())
    layer.register_buffer("weight_zero_point", zero_point.detach().clone(), persistent=not grid.symmetric)
    values = {
        "weight_grid": grid,
        "weight_shape": tuple(q.shape),
        "is_packed": packed_bits(grid) < 8,
        "is_channels_last": channels_last,
        "sharing": (),
    }
    vars(layer).update(values)


def unpack_weights(model: nn.Module) -> nn.Module:
    """Hold every packed weight of `model` as one integer a byte, in place: for exporters that need them so."""
    done: dict[int, Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, IntegerLayer) and layer.is_packed:
            layer._buffers["weight"] = done.setdefault(id(layer.stored), layer.int_weight())
            layer.is_packed = False
    return model
