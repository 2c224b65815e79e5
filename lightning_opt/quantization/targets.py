"""The layers whose weights can be rounded in other ways than one by one, and how new weights get into them."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.pruning.inputs import Reader, reader_for
from lightning_opt.quantization.functional import scale_and_zero_point
from lightning_opt.quantization.improvement import Outcome, Refused, first_reasons
from lightning_opt.quantization.layers.base import QuantizedLayer
from lightning_opt.quantization.layerwise import Stage, shared_weights
from lightning_opt.quantization.observers import MinMax
from lightning_opt.quantization.ops import along
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.rounding import Lattice, from_rows, to_rows
from lightning_opt.quantization.state import set_enabled

_KINDS = ("linear", "convolution")
_SMALLEST_FACTOR = 1e-12
_LARGEST_PART = 2**25  # numbers in the rows of one part


@dataclass(frozen=True)
class Target:
    """A layer that multiplies rows of inputs with its weight.

    Attributes:
        path: Its full name.
        layer: A quantized layer.
        reader: Turns what it is given into rows, those of a convolution unfolded.
    """

    path: str
    layer: QuantizedLayer
    reader: Reader

    @property
    def quantizer(self) -> FakeQuantizer:
        """The quantizer of the weight."""
        return cast(FakeQuantizer, self.layer.weight_quantizer)

    def rows(self) -> Tensor:
        """Return the weight as the layer computes with it in evaluation, before rounding: `(G, O, I)` float32."""
        weight = self.layer.deployed_weight()[0].detach().float()
        return to_rows(weight, output_dim=self.layer.kind.axis, groups=self.reader.groups)

    def read(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the rows in what the layer is given, `(G, rows, I)` float32, in parts of bounded size."""
        if self.layer.input_quantizer is not None:
            x = self.layer.input_quantizer(x)
        yield from self._parts(x)

    def read_pair(self, x: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows in what the layer is given, as `read` does, beside those that it is given in a float model."""
        yield from zip(self.read(x), self._parts(wanted), strict=True)

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        unfolded = x.numel() * (
            cast(Tensor, self.layer.weight)[0, 0].numel() if self.layer.kind.name == "convolution" else 1
        )
        samples = max(1, len(x) * _LARGEST_PART // max(unfolded, 1))
        for part in x.split(samples):
            yield self.reader.rows(part)

    def rounded_rows(self) -> Tensor:
        """Return the weight that the layer computes with in evaluation, `(G, O, I)` float32."""
        return self.lattice().nearest(self.rows())

    def lattice(self) -> Lattice:
        """Return where the weights may lie, with the grid that fits them as they are."""
        quantizer, weight = self.quantizer, self.layer.deployed_weight()[0].detach()
        if quantizer.observing or not quantizer.is_fitted:
            quantizer.fit(weight)
        rows, grid = self.rows(), quantizer.grid
        shape = (*rows.shape[:2], -1)
        scale = quantizer.scale.detach().clone()
        zero_point = quantizer.zero_point.to(scale.dtype)
        if grid.axis is None:
            scale, zero_point = (values.expand(rows.shape[0] * rows.shape[1]) for values in (scale, zero_point))
        width = rows.shape[-1] if grid.group_size is None else grid.group_size
        return Lattice(scale.reshape(shape), zero_point.reshape(shape), grid.qmin, grid.qmax, width)

    def refit(self, run: Tensor) -> tuple[Tensor, Tensor]:
        """Fit scale and zero point, `(G, O)` each, to one run of columns, `(G, O, width)`."""
        quantizer = self.quantizer
        grid = dataclasses.replace(quantizer.grid, axis=0, group_size=None)
        low, high = (quantizer.spec or MinMax()).of(run.flatten(0, 1), grid)
        scale, zero_point = scale_and_zero_point(low, high, grid)
        return scale.view(run.shape[:2]), zero_point.view(run.shape[:2]).to(scale.dtype)

    @torch.no_grad()
    def write(self, rows: Tensor, lattice: Lattice) -> None:
        """Give the layer weights that lie on the lattice, and fix its grid, so that they are what it computes with.

        Args:
            rows: The weights, `(G, O, I)`.
            lattice: What they lie on.
        """
        weight, quantizer = cast(Tensor, self.layer.weight), self.quantizer
        new = from_rows(rows, weight.float(), output_dim=self.layer.kind.axis)
        if self.layer.norm is not None:
            factor = along(self.layer.norm.factor(), new, self.layer.kind.axis)
            usable = factor.abs() >= _SMALLEST_FACTOR
            new = torch.where(usable, new / torch.where(usable, factor, 1.0), weight.float())
        weight.copy_(new)
        count = quantizer.scale.numel()
        quantizer.scale.copy_(lattice.scale.reshape(-1)[:count])
        quantizer.zero_point.copy_(lattice.zero_point.reshape(-1)[:count])
        quantizer.fitted.fill_(True)
        quantizer.freeze()


def targets_in(
    model: nn.Module, *, exclude: Sequence[str] = (), by: str, shared: bool = False
) -> tuple[dict[str, Target], tuple[Refused, ...]]:
    """Find the layers of a prepared model whose weights can be rewritten.

    Args:
        model: A prepared model.
        exclude: Patterns (`fnmatch`) of full names of layers to leave alone.
        by: What is to rewrite them, for the error.
        shared: Take also layers that share their weight with another one.

    Returns:
        The layers by their full names, in the order of the model, and those that cannot be rewritten.

    Raises:
        ConfigError: There is none.
    """
    tied = set() if shared else shared_weights(model)
    found: dict[str, Target] = {}
    refused: list[Refused] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer) or layer.weight_quantizer is None:
            continue
        if any(fnmatchcase(path, pattern) for pattern in exclude):
            continue
        reader, why = _reader(layer, tied)
        if reader is None:
            refused.append(Refused(path=path, why=why))
        else:
            found[path] = Target(path, layer, reader)
    if not found:
        raise ConfigError(f"{by} finds no layer to rewrite in this model ({first_reasons(refused)}); leave it out")
    return found, tuple(refused)


def switched_off(model: nn.Module) -> nn.Module:
    """Return a copy of a prepared model that rounds nothing."""
    twin = copy.deepcopy(model)
    set_enabled(twin, False)
    return twin


def outcome(targets: Mapping[str, Target], visited: Sequence[Stage], refused: Sequence[Refused]) -> Outcome:
    """Return what was done to which layers; those that are in no stage were not called."""
    changed = [path for stage in visited for path in stage.paths]
    unused = [Refused(path=path, why="the model does not call it") for path in targets if path not in changed]
    return Outcome(changed=tuple(changed), refused=(*refused, *unused))


def _reader(layer: QuantizedLayer, tied: set[int]) -> tuple[Reader | None, str]:
    weight = cast(Tensor, layer.weight)
    grid = cast(FakeQuantizer, layer.weight_quantizer).grid
    if layer.kind.name not in _KINDS:
        return None, f"a layer of the kind {layer.kind.name!r} does not multiply rows of inputs"
    if id(weight) in tied:
        return None, "its weight is shared with another layer"
    if grid.is_float:
        return None, "its grid is of 8-bit floats"
    if grid.axis not in (None, layer.kind.axis):
        return None, f"its scales run along axis {grid.axis}, not along outputs"
    reader = reader_for(layer, "weight")
    if reader is None:
        return None, "nothing says how its inputs meet its weight (pruning.inputs.reader_for)"
    return reader, ""
