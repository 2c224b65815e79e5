"""A teacher whose weights are 8-bit integers: a quarter of the memory, nearly the same answers.

Each row of a weight (an output channel, a token's embedding) has a scale of its own and nothing is calibrated. The
integers are parameters, so that a sharded teacher's slices are of integers, too.
"""

import copy
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_opt.errors import ConfigError

_MOST = 127
_SMALLEST = 1e-12  # a row of zeros keeps a scale
_FEWEST_ROWS = 17  # of torch's integer product on GPUs
_STEP = 8
_FIRST_CAPABILITY = (8, 0)


class Int8Weight(nn.Module):
    """What a layer becomes: integers, a scale for each row of them, and the weight that they stand for on demand.

    Attributes:
        integers: int8, in the shape of the weight.
        scale: float32, one number for each row of `integers`, shaped to be multiplied with it.
    """

    integers: nn.Parameter
    scale: nn.Parameter
    rows: ClassVar[int] = 0

    def widened(self) -> Tensor:
        """Return the weight in float32, made anew."""
        return self.integers.to(self.scale.dtype) * self.scale

    @override
    def __getattr__(self, name: str) -> Any:
        # For code around the layer that reads its weight, such as a head that is tied to it.
        return self.widened() if name == "weight" else super().__getattr__(name)


class Int8Linear(Int8Weight, nn.Linear):
    """Multiply in integers where the device does so fast, else widen the weight in front of the product."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, input.shape[-1])
        if not multiplies_integers(flat, self.integers):
            return functional.linear(input, self.widened().to(input.dtype), self.bias)
        # Dettmers and others, 2022, "LLM.int8()", arXiv 2208.07339, section 2.1: a scale for each row on both sides.
        scale = (flat.abs().amax(1, keepdim=True).float() / _MOST).clamp(min=_SMALLEST)
        rounded = (flat / scale).round_().to(torch.int8)
        product = torch._int_mm(rounded, self.integers.t()).float() * scale * self.scale.reshape(1, -1)
        product = product.to(input.dtype).reshape(*input.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


class Int8Embedding(Int8Weight, nn.Embedding):
    """Look integers up and widen only the rows that were asked for."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        found = functional.embedding(input, self.integers)
        return found.to(self.scale.dtype) * functional.embedding(input, self.scale)


class Int8Conv1d(Int8Weight, nn.Conv1d):
    """Widen the kernels in front of the convolution."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.widened().to(input.dtype), self.bias)


class Int8Conv2d(Int8Weight, nn.Conv2d):
    """Widen the kernels in front of the convolution."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.widened().to(input.dtype), self.bias)


class Int8Transposed(Int8Weight):
    """A linear layer whose weight is `(inputs, outputs)`, as in Hugging Face's GPT-2; a row is an output."""

    rows = 1
    bias: Tensor

    @override
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.widened().to(x.dtype).t(), self.bias)


_EIGHT_BIT: dict[type[nn.Module], type[Int8Weight]] = {
    nn.Linear: Int8Linear,
    nn.Embedding: Int8Embedding,
    nn.Conv1d: Int8Conv1d,
    nn.Conv2d: Int8Conv2d,
}


@torch.no_grad()
def as_int8(network: nn.Module) -> nn.Module:
    """Return a copy of a network that holds its large weights in 8 bits.

    Linear layers, convolutions and embeddings are exchanged, weights that are tied stay tied; norms and biases remain.

    Raises:
        ConfigError: It has no such layer.
    """
    network = copy.deepcopy(network)
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for layer in list(network.modules()):
        if (kind := _kind_of(layer)) is None:
            continue
        weight = cast(nn.Parameter, layer._parameters.pop("weight"))
        if id(weight) not in made:
            made[id(weight)] = _rounded(weight, kind.rows)
        layer.__class__ = kind
        layer.integers, layer.scale = made[id(weight)]
    if not made:
        raise ConfigError(
            f"teacher.dtype=int8: {type(network).__name__} has no linear layer, convolution or embedding; set "
            "teacher.dtype=null"
        )
    return network


def multiplies_integers(rows: Tensor, weight: Tensor) -> bool:
    """Tell whether integers are multiplied as such: on GPUs that can, for sizes that their kernel takes."""
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < _FIRST_CAPABILITY:
        return False
    return rows.shape[0] >= _FEWEST_ROWS and not any(size % _STEP for size in weight.shape)


def how(network: nn.Module) -> str:
    """Return in words what was made 8 bits wide and how it is computed with."""
    layers = [module for module in network.modules() if isinstance(module, Int8Weight)]
    count = f"int8 weights in {len(layers)} layers, a scale a row"
    linear = [layer for layer in layers if isinstance(layer, Int8Linear)]
    if linear and multiplies_integers(torch.empty(_FEWEST_ROWS, 0), linear[0].integers):
        return f"{count}; linear layers multiply int8 with int8, the others widen their weights first"
    return f"{count}; weights are widened in front of each product"


def _kind_of(layer: nn.Module) -> type[Int8Weight] | None:
    if type(layer).__name__ == "Conv1D" and getattr(layer, "nf", None) is not None:
        return _transposed(type(layer))
    kind = _EIGHT_BIT.get(type(layer))
    if kind is Int8Embedding and (cast(Any, layer).max_norm is not None or cast(Any, layer).sparse):
        return None
    return kind


def _transposed(own: type[nn.Module]) -> type[Int8Weight]:
    return type("Int8Conv1D", (Int8Transposed, own), {})


def _rounded(weight: Tensor, rows: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the integers and scales of a weight whose rows are along the axis `rows`."""
    values = weight.detach().float()
    axes = [axis for axis in range(values.dim()) if axis != rows]
    scale = (values.abs().amax(axes, keepdim=True) / _MOST).clamp(min=_SMALLEST)
    integers = (values / scale).round_().clamp_(-_MOST, _MOST).to(torch.int8)
    return nn.Parameter(integers, requires_grad=False), nn.Parameter(scale, requires_grad=False)
