"""How a layer's weight meets the layer's inputs: which rows of numbers each weight element is multiplied with.

`reader_for(owner, name)` is a `functools.singledispatch` on the owning module; register a handler for a module of your
own there. The fallback serves every module with a two-dimensional weight and finds out from the data whether the weight
is kept as `(out, in)` or `(in, out)`.
"""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence

from lightning_opt.pruning.parts import is_sharded


class Reader:
    """Turns a layer's inputs into rows, one number for each input that the weight has.

    Args:
        weight: The parameter.
        input_dim: Its dimension that runs over inputs; None: find out from the first batch.
        groups: Groups of a convolution.
    """

    def __init__(self, weight: Tensor, *, input_dim: int | None = 1, groups: int = 1) -> None:
        self.weight, self.input_dim, self.groups = weight, input_dim, groups

    def shape(self, field: str) -> tuple[int, ...]:
        """Return the shape of "input_norm", "gram" or "output_norm"."""
        by_rows = self.input_dim == 0
        if field == "output_norm":
            return (self.weight.shape[1] if by_rows else self.weight.shape[0],)
        each = self.weight.shape[0] if by_rows else self.weight.shape[1:].numel()
        if field == "input_norm":
            return (self.groups * each,)
        return (each, each) if self.groups == 1 else (self.groups, each, each)

    def rows(self, x: Tensor) -> Tensor:
        """Return the inputs as `(groups, rows, features / groups)` float32."""
        return x.reshape(1, -1, x.shape[-1]).float()

    def squares(self, x: Tensor) -> Tensor:
        """Return the sum of squares of each input feature, `(features,)`, over all rows."""
        return x.reshape(-1, x.shape[-1]).float().square().sum(dim=0)

    def gram(self, x: Tensor) -> Tensor:
        """Return `X^T X`: `(features, features)`, or one such matrix for each group of a convolution."""
        rows = self.rows(x)
        gram = rows.mT @ rows
        return gram[0] if self.groups == 1 else gram

    def outputs(self, y: Tensor) -> Tensor:
        """Return the sum of squares of each output feature over all rows."""
        return y.reshape(-1, y.shape[-1]).float().square().sum(dim=0)

    def find_input_dim(self, x: Tensor, y: Tensor) -> None:
        """Settle which dimension of a two-dimensional weight runs over inputs, from one batch.

        The shapes say it unless the weight is square; then the layer's own arithmetic does, on a few rows. Rows are
        compared with the first of them, so that a bias does not count.

        Raises:
            ValueError: The weight fits neither way.
        """
        if self.input_dim is not None:
            return
        rows, out = x.reshape(-1, x.shape[-1])[:9].double(), y.reshape(-1, y.shape[-1])[:9].double()
        fits = [dim for dim in (1, 0) if tuple(self.weight.shape) == _shape(rows, out, dim)]
        if not fits:
            raise ValueError(
                f"a weight of shape {tuple(self.weight.shape)} does not turn {rows.shape[1]} inputs into "
                f"{out.shape[1]} outputs; register a reader for its module (pruning.inputs.reader_for)"
            )
        weight = self._whole_weight().double()
        wanted, moved = out - out[:1], rows - rows[:1]
        misses = {dim: (wanted - moved @ (weight.T if dim else weight)).norm().item() for dim in fits}
        self.input_dim = min(misses, key=misses.__getitem__)

    def _whole_weight(self) -> Tensor:
        weight: Any = self.weight.detach()
        whole: Tensor = weight.full_tensor() if is_sharded(weight) else weight  # all processes are in this layer now
        return whole


class EmbeddingReader(Reader):
    """Reads ids: an embedding is a linear layer on one-hot rows."""

    def squares(self, x: Tensor) -> Tensor:
        return torch.bincount(x.flatten(), minlength=self.weight.shape[0]).float()

    def shape(self, field: str) -> tuple[int, ...]:
        return super().shape(field) if field != "gram" else (0,)  # nothing is kept of it

    def gram(self, x: Tensor) -> Tensor:
        raise ValueError("an embedding's X^T X is diagonal; use a criterion with input_norm instead of a solver")


class ConvReader(Reader):
    """Reads the windows of a convolution of any number of dimensions, in the order of `unfold`."""

    def __init__(self, owner: _ConvNd) -> None:
        super().__init__(owner.weight, input_dim=1, groups=owner.groups)
        self.owner = owner

    def rows(self, x: Tensor) -> Tensor:
        windows = self._windows(self._batched(x).float())  # (B, C, *L, *k)
        spatial = len(self.owner.kernel_size)
        grouped = windows.unflatten(1, (self.groups, -1)).movedim(1, 0)  # (G, B, C / G, *L, *k)
        rows = grouped.movedim(2, 2 + spatial).flatten(2 + spatial)  # (G, B, *L, C / G * k)
        return rows.flatten(1, 1 + spatial)

    def squares(self, x: Tensor) -> Tensor:
        summed = self._batched(x).float().square().sum(dim=0, keepdim=True)
        windows = self._windows(summed)[0]
        spatial = len(self.owner.kernel_size)
        return windows.sum(dim=tuple(range(1, 1 + spatial))).flatten()

    def outputs(self, y: Tensor) -> Tensor:
        return self._batched(y).transpose(0, 1).flatten(1).float().square().sum(dim=1)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.owner.kernel_size) + 2 else x.unsqueeze(0)

    def _windows(self, x: Tensor) -> Tensor:
        owner = self.owner
        mode = "constant" if owner.padding_mode == "zeros" else owner.padding_mode
        x = functional.pad(x, owner._reversed_padding_repeated_twice, mode=mode)
        shape = zip(owner.kernel_size, owner.stride, owner.dilation, strict=True)
        for place, (kernel, stride, dilation) in enumerate(shape):
            x = x.unfold(2 + place, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        return x


class TransposedConvReader(Reader):
    """Reads the channels of a transposed convolution; every kernel position meets the same inputs."""

    def __init__(self, owner: _ConvTransposeNd) -> None:
        super().__init__(owner.weight, input_dim=0)
        self.owner = owner

    def shape(self, field: str) -> tuple[int, ...]:
        return (self.owner.out_channels,) if field == "output_norm" else super().shape(field)

    def rows(self, x: Tensor) -> Tensor:
        batched = x if x.dim() == len(self.owner.kernel_size) + 2 else x.unsqueeze(0)
        return batched.movedim(1, -1).reshape(1, -1, batched.shape[1]).float()

    def squares(self, x: Tensor) -> Tensor:
        return self.rows(x)[0].square().sum(dim=0)

    def outputs(self, y: Tensor) -> Tensor:
        return self.squares(y)


@singledispatch
def reader_for(owner: nn.Module, name: str) -> Reader | None:
    """Return what reads the inputs of parameter `name` of `owner`, or None where it meets none (biases, norms).

    Args:
        owner: The module that holds the parameter.
        name: The parameter's name in it.
    """
    weight = getattr(owner, name)
    if weight.dim() != 2 or isinstance(owner, nn.MultiheadAttention):  # its inputs are three, its output layer uncalled
        return None
    return Reader(weight, input_dim=None)


@reader_for.register
def _(owner: nn.Linear, name: str) -> Reader | None:
    return Reader(owner.weight) if name == "weight" else None


@reader_for.register
def _(owner: nn.Embedding, name: str) -> Reader | None:
    return EmbeddingReader(owner.weight, input_dim=0)


@reader_for.register
def _(owner: nn.EmbeddingBag, name: str) -> Reader | None:
    return EmbeddingReader(owner.weight, input_dim=0)


@reader_for.register
def _(owner: _ConvNd, name: str) -> Reader | None:
    return ConvReader(owner) if name == "weight" else None


@reader_for.register
def _(owner: _ConvTransposeNd, name: str) -> Reader | None:
    return TransposedConvReader(owner) if name == "weight" else None


@reader_for.register
def _(owner: nn.RNNBase, name: str) -> Reader | None:
    return Reader(getattr(owner, name)) if name in ("weight_ih_l0", "weight_ih_l0_reverse") else None


def first_tensor(*places: Any) -> Tensor | None:
    """Return the first tensor among a call's arguments or a module's answer, or None."""
    for place in places:
        if isinstance(place, Tensor):
            return place
        if isinstance(place, PackedSequence):
            return place.data
        values = place.values() if isinstance(place, dict) else place if isinstance(place, tuple | list) else ()
        found = first_tensor(*values)
        if found is not None:
            return found
    return None


def _shape(rows: Tensor, out: Tensor, input_dim: int) -> tuple[int, int]:
    return (out.shape[1], rows.shape[1]) if input_dim else (rows.shape[1], out.shape[1])
