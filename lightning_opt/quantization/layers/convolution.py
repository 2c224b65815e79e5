"""Convolutions, plain and transposed, of one to three dimensions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.quantization.layers.base import LayerKind, handler

_TRANSPOSED = {
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}


@handler.register(nn.Conv1d)
@handler.register(nn.Conv2d)
@handler.register(nn.Conv3d)
def _convolution(module: Any) -> LayerKind:
    return _KINDS[next(kind for kind in _KINDS if isinstance(module, kind))]


@handler.register(nn.ConvTranspose1d)
@handler.register(nn.ConvTranspose2d)
@handler.register(nn.ConvTranspose3d)
def _transposed(module: Any) -> LayerKind:
    return _KINDS[next(kind for kind in _KINDS if isinstance(module, kind))]


def _compute(module: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    answer: Tensor = module._conv_forward(input, weight, bias)  # it also pads as the layer says
    return answer


def _compute_transposed(
    module: Any, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None = None
) -> Tensor:
    dims = len(module.kernel_size)
    padding = module._output_padding(
        input, output_size, module.stride, module.padding, module.kernel_size, dims, module.dilation
    )
    function = next(function for kind, function in _TRANSPOSED.items() if isinstance(module, kind))
    answer: Tensor = function(
        input, weight, bias, module.stride, module.padding, padding, module.groups, module.dilation
    )
    return answer


_KINDS: dict[type[nn.Module], LayerKind] = {
    kind: LayerKind(name="convolution", layer=kind, compute=_compute) for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
} | {
    kind: LayerKind(name="transposed convolution", layer=kind, compute=_compute_transposed, axis=1)
    for kind in _TRANSPOSED
}
