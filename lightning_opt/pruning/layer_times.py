"""How long each layer takes at each width.

A FLOP is not a FLOP: engines compute whole lanes, small layers cost their overhead, and wide maps wait for memory.
"""

import itertools
import math
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_opt.forward import Inputs, forward

Timer: TypeAlias = Callable[[nn.Module, Tensor], float]


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or a linear layer, as the example inputs made it.

    Attributes:
        weight: Full name of the weight.
        out_dim: Dimension of the weight that runs over outputs.
        in_dim: The one that runs over inputs.
        shape: Of the weight.
        kernel: Weight elements for each pair of input and output.
        positions: How often the weight is applied: batch times places of the output.
        input_shape: Of the layer's input.
        options: For the convolution's constructor; None for linear layers.
        is_depthwise: The weight has one input for each output.
    """

    weight: str
    out_dim: int
    in_dim: int
    shape: tuple[int, ...]
    kernel: int
    positions: int
    input_shape: tuple[int, ...]
    options: Mapping[str, Any] | None
    is_depthwise: bool

    @property
    def widths(self) -> tuple[int, int]:
        """Outputs and inputs of the layer as it is."""
        return self.shape[self.out_dim], self.shape[self.out_dim if self.is_depthwise else self.in_dim]

    def flops(self, outputs: int, inputs: int) -> float:
        """Return the floating point operations at other widths: two for each multiply-accumulate."""
        return 2.0 * outputs * (1 if self.is_depthwise else inputs) * self.kernel * self.positions


class Times(ABC):
    """Tells how long a layer takes, in milliseconds, at a number of outputs and inputs."""

    @abstractmethod
    def ms(self, layer: Layer, outputs: int, inputs: int) -> float:
        """Return the time of one call in milliseconds."""


@dataclass(frozen=True)
class AnalyticTimes(Times):
    """The larger of arithmetic and memory traffic, in whole lanes, and an overhead; only proportions matter.

    Args:
        lane: Channels that are computed together: widths in between cost as much as the next multiple.
        gflops: Floating point operations in 1e9 per second.
        gigabytes_per_s: Memory traffic.
        overhead_ms: Of each call.
    """

    lane: int = 16
    gflops: float = 60.0
    gigabytes_per_s: float = 10.0
    overhead_ms: float = 0.005

    def ms(self, layer: Layer, outputs: int, inputs: int) -> float:
        wide_out, wide_in = (math.ceil(width / self.lane) * self.lane for width in (outputs, inputs))
        full_in = layer.widths[1]
        elements = wide_out * (1 if layer.is_depthwise else wide_in) * layer.kernel
        arithmetic_ms = layer.flops(wide_out, wide_in) / (self.gflops * 1e6)
        read = math.prod(layer.input_shape) * wide_in / full_in
        memory_ms = 4.0 * (elements + read + layer.positions * wide_out) / (self.gigabytes_per_s * 1e6)
        return max(arithmetic_ms, memory_ms) + self.overhead_ms


@dataclass
class MeasuredTimes(Times):
    """Each layer timed on this machine at a few widths, each shape once; in between is interpolated.

    Below the least width that was timed a layer takes its part of that time: the line would end below zero.

    Args:
        timer: Times a layer on an input, in milliseconds; `time_in_torch` when not given. Give your
            engine's, such as `time_in_onnxruntime`.
        step: Widths that are timed are multiples of it.
        points: How many widths are timed along each axis: all of it, a half, a quarter and so on, since it is at small
            widths that engines lose their speed.
    """

    timer: Timer | None = None
    step: int = 16
    points: int = 4
    _known: dict[Any, tuple[list[int], list[int], list[list[float]]]] = field(default_factory=dict, repr=False)

    def ms(self, layer: Layer, outputs: int, inputs: int) -> float:
        key = (layer.shape, layer.input_shape, str(layer.options))
        if key not in self._known:
            self._known[key] = self._measure(layer)
        rows, columns, table = self._known[key]
        below = min(outputs / rows[0], 1.0) * (1.0 if layer.is_depthwise else min(inputs / columns[0], 1.0))
        at_row, row_part = _between(rows, outputs)
        at_column, column_part = _between(columns, inputs)
        last_row, last_column = len(rows) - 1, len(columns) - 1
        corners = [
            table[min(at_row + i, last_row)][min(at_column + j, last_column)]
            for i, j in itertools.product((0, 1), repeat=2)
        ]
        low = corners[0] + column_part * (corners[1] - corners[0])
        high = corners[2] + column_part * (corners[3] - corners[2])
        return below * (low + row_part * (high - low))

    def _measure(self, layer: Layer) -> tuple[list[int], list[int], list[list[float]]]:
        rows, columns = (_grid(width, self.step, self.points) for width in layer.widths)
        timer = self.timer or time_in_torch
        if layer.is_depthwise:
            times = [timer(*_build(layer, width, width)) for width in rows]
            return rows, columns, [[each] * len(columns) for each in times]
        return rows, columns, [[timer(*_build(layer, o, i)) for i in columns] for o in rows]


def layers_of(model: nn.Module, example_inputs: Inputs) -> list[Layer]:
    """Run the model once, in eval mode, and return the calls of its convolutions and linear layers.

    A layer without a module of its own (a parameter that `forward` multiplies with) is not seen.
    """
    found: list[Layer] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            found.append(_layer(f"{names[module]}.weight".lstrip("."), module, inputs[0], output))

    handles = [module.register_forward_hook(note) for module in names if _is_layer(module)]
    modes = {module: module.training for module in names}
    try:
        model.eval()
        with torch.no_grad():
            forward(model, example_inputs)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return found


def time_in_torch(layer: nn.Module, x: Tensor, *, repeats: int = 7) -> float:
    """Time a layer in eager torch: the least of several calls, in milliseconds."""
    times = []
    with torch.no_grad():
        layer(x)
        for _ in range(repeats):
            started = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def _is_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    return isinstance(module, _ConvNd) or weight.dim() == 2


def _layer(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Layer:
    shape = tuple(module.get_parameter("weight").shape)
    if isinstance(module, _ConvNd):
        turned = isinstance(module, _ConvTransposeNd)
        options = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation")}
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        positions = (x.numel() // x.shape[1]) if turned else (y.numel() // y.shape[1])
        kernel = math.prod(module.kernel_size)
        out_dim = 1 if turned else 0
        return Layer(name, out_dim, 1 - out_dim, shape, kernel, positions, tuple(x.shape), options, depthwise)
    out_dim = 0 if shape[0] == y.shape[-1] and shape[1] == x.shape[-1] else 1
    return Layer(name, out_dim, 1 - out_dim, shape, 1, y.numel() // y.shape[-1], tuple(x.shape), None, False)


def _build(layer: Layer, outputs: int, inputs: int) -> tuple[nn.Module, Tensor]:
    """Make a layer of other widths and an input for it."""
    shape = list(layer.input_shape)
    if layer.options is None:
        return _filled(nn.Linear, inputs, outputs), torch.randn(*shape[:-1], inputs)
    shape[1] = inputs
    turned = layer.out_dim == 1
    plain = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    kind: Any = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}[len(shape)] if turned else plain
    groups = inputs if layer.is_depthwise else 1
    return _filled(kind, inputs, outputs, groups=groups, **layer.options), torch.randn(*shape)


def _filled(kind: Any, *args: Any, **options: Any) -> nn.Module:
    """Make a layer without drawing its weights, which takes longer than to time it; all are of usual size."""
    layer: nn.Module = nn.utils.skip_init(kind, *args, **options)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 0.01)
    return layer


def _grid(width: int, step: int, points: int) -> list[int]:
    found = {max(round(width / 2**halved / step) * step, step) for halved in range(1, points)}
    return sorted({point for point in found if point < width} | {width})


def _between(points: Sequence[int], value: int) -> tuple[int, float]:
    """Return the place of the point below `value` and how far it is to the next; the first where there is none."""
    if len(points) == 1 or value <= points[0]:
        return 0, 0.0
    place = min(max(bisect_left(points, value) - 1, 0), len(points) - 2)
    return place, (value - points[place]) / (points[place + 1] - points[place])
