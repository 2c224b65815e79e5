"""Which range of values a grid should cover: what has been seen of a tensor, in bounded memory.

A spec such as `Percentile(q=0.999)` is plain values. Its `start(grid, channels)` gives a state: a module with buffers,
which is updated without any wait for the device, is merged over ranks by element-wise reductions, and is saved and
resumed with the model. All are deterministic.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_opt.quantization import histogram
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.ops import group, widen

Reduction: TypeAlias = Literal["min", "max", "sum", "mean"]


class ObserverState(nn.Module, ABC):
    """What one observer has seen of one tensor.

    Args:
        grid: The grid whose range is looked for.
        channels: How many ranges there are.
    """

    def __init__(self, grid: Grid, channels: int) -> None:
        super().__init__()
        self.grid, self.channels = grid, channels

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take note of a tensor."""

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value that the grid should cover, each `(n,)`."""

    @abstractmethod
    def reductions(self) -> list[tuple[Tensor, Reduction]]:
        """Return the buffers, each with how the same buffers of all ranks become one, in place."""


@dataclass(frozen=True)
class Observer(ABC):
    """How a range is found: plain values. A subclass gives its `name` and its state.

    Attributes:
        name: In plain values.
        is_cheap: The range may be asked for at each step of training.
    """

    name: ClassVar[str]
    is_cheap: ClassVar[bool] = False

    @abstractmethod
    def start(self, grid: Grid, channels: int = 1) -> ObserverState:
        """Return a state that has seen nothing."""

    def of(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the range for one tensor that is at hand, such as a weight."""
        state = self.start(grid, grid.channels(x)).to(x.device)
        state.update(x)
        return state.range()

    def to_dict(self) -> dict[str, Any]:
        """Return the observer as plain values."""
        return {"name": self.name, **dataclasses.asdict(self)}


def observer_from_dict(values: Mapping[str, Any] | str) -> Observer:
    """Make an observer from its name, or from plain values with a `name` among them.

    Raises:
        ValueError: The name or a value is not known.
    """
    values = {"name": values} if isinstance(values, str) else dict(values)
    name = values.pop("name", None)
    known = {kind.name: kind for kind in _subclasses(Observer) if hasattr(kind, "name")}  # type: ignore[type-abstract]
    if name not in known:
        raise ValueError(f"observer {name!r} is not known; known are {', '.join(sorted(known))}")
    try:
        return known[name](**values)
    except TypeError as error:
        raise ValueError(f"observer {name!r}: {error}") from error


def _subclasses(kind: type[Observer]) -> Iterator[type[Observer]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def extremes(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest values of `x` that share a scale, each `(n,)`."""
    x = widen(x.detach())
    if grid.axis is None:
        low, high = torch.aminmax(x)
        return low.reshape(1), high.reshape(1)
    # Two reductions: along a dim aminmax takes ten times as long on CPUs.
    laid = rows(x, grid)
    return laid.amin(dim=1), laid.amax(dim=1)


def rows(x: Tensor, grid: Grid) -> Tensor:
    """Lay `x` out as `(n, values that share a scale)`; groups that are not full are filled up with zeros."""
    if grid.axis is None:
        return x.reshape(1, -1)
    if grid.group_size is not None:
        return group(x, grid.axis, grid.group_size).flatten(0, 1)
    return x.movedim(grid.axis, 0).reshape(x.shape[grid.axis], -1)


@dataclass(frozen=True)
class MinMax(Observer):
    """The smallest and the largest value ever seen."""

    name: ClassVar[str] = "min_max"
    is_cheap: ClassVar[bool] = True

    def start(self, grid: Grid, channels: int = 1) -> ObserverState:
        return _MinMaxState(grid, channels)

    def of(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return extremes(x, grid)


class _MinMaxState(ObserverState):
    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, channels: int) -> None:
        super().__init__(grid, channels)
        # A grid always covers 0, so that 0 is as good a start as infinity and stays finite in a checkpoint.
        self.register_buffer("low", torch.zeros(channels))
        self.register_buffer("high", torch.zeros(channels))

    def update(self, x: Tensor) -> None:
        low, high = extremes(x, self.grid)
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def reductions(self) -> list[tuple[Tensor, Reduction]]:
        return [(self.low, "min"), (self.high, "max")]


@dataclass(frozen=True)
class MovingAverage(Observer):
    """The exponential moving average of each batch's smallest and largest value.

    Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko (2017), "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 3.1.

    Args:
        momentum: The weight of the newest batch; the first batch counts whole.

    Raises:
        ValueError: `momentum` is not in (0, 1].
    """

    name: ClassVar[str] = "moving_average"
    is_cheap: ClassVar[bool] = True
    momentum: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must be more than 0 and at most 1, not {self.momentum}")

    def start(self, grid: Grid, channels: int = 1) -> ObserverState:
        return _MovingAverageState(grid, channels, self.momentum)


class _MovingAverageState(ObserverState):
    low: Tensor
    high: Tensor
    weight: Tensor

    def __init__(self, grid: Grid, channels: int, momentum: float) -> None:
        super().__init__(grid, channels)
        self.momentum = momentum
        self.register_buffer("low", torch.zeros(channels))
        self.register_buffer("high", torch.zeros(channels))
        self.register_buffer("weight", torch.ones(1))

    def update(self, x: Tensor) -> None:
        low, high = extremes(x, self.grid)
        self.low.lerp_(low.to(self.low.dtype), self.weight)
        self.high.lerp_(high.to(self.high.dtype), self.weight)
        self.weight.fill_(self.momentum)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def reductions(self) -> list[tuple[Tensor, Reduction]]:
        return [(self.low, "mean"), (self.high, "mean")]


class _HistogramState(_MinMaxState):
    """Counts of values, in bins that are the same for every tensor and every rank."""

    counts: Tensor

    def __init__(self, grid: Grid, channels: int, spec: "_ByHistogram") -> None:
        super().__init__(grid, channels)
        self.spec = spec
        self.register_buffer("counts", torch.zeros(channels, histogram.BINS, dtype=torch.int64))

    def update(self, x: Tensor) -> None:
        super().update(x)
        histogram.add(self.counts, rows(widen(x.detach()), self.grid))

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = self.spec.find(self.counts, self.low, self.high, self.grid)
        return torch.maximum(low.clamp(max=0), self.low), torch.minimum(high.clamp(min=0), self.high)

    def reductions(self) -> list[tuple[Tensor, Reduction]]:
        return [*super().reductions(), (self.counts, "sum")]


@dataclass(frozen=True)
class _ByHistogram(Observer):
    """A range that is found from a histogram of all values seen."""

    def start(self, grid: Grid, channels: int = 1) -> ObserverState:
        return _HistogramState(grid, channels, self)

    @abstractmethod
    def find(self, counts: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Return the range, which is then cut to the smallest and the largest value seen, `low` and `high`, `(n,)`."""


@dataclass(frozen=True)
class Percentile(_ByHistogram):
    """The range that holds the share `q` of all values, with the same share of the rest cut off at each end.

    Args:
        q: Share of the values inside.

    Raises:
        ValueError: `q` is not in (0.5, 1].
    """

    name: ClassVar[str] = "percentile"
    q: float = 0.9999

    def __post_init__(self) -> None:
        if not 0.5 < self.q <= 1:
            raise ValueError(f"q must be more than 0.5 and at most 1, not {self.q}")

    def find(self, counts: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return histogram.percentiles(counts, self.q)


@dataclass(frozen=True)
class MSE(_ByHistogram):
    """The range whose grid changes the values seen the least: the least mean squared error.

    Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort (2021), "A White Paper on Neural Network
    Quantization", arXiv 2106.08295, section 3.1. The range that holds all values is shrunk step by step.

    Args:
        steps: How many ranges are tried.

    Raises:
        ValueError: `steps` is less than 1.
    """

    name: ClassVar[str] = "mse"
    steps: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def of(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return histogram.least_squares_exact(rows(widen(x.detach()), grid), grid, self.steps)

    def find(self, counts: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return histogram.least_squares(counts, low, high, grid, self.steps)


@dataclass(frozen=True)
class Entropy(_ByHistogram):
    """The range whose grid keeps the distribution of the values seen: the least Kullback-Leibler divergence.

    Migacz (2017), "8-bit Inference with TensorRT", GTC: the histogram of magnitudes, cut at a threshold, with what is
    beyond added to the last bin, against the same histogram merged into as many bins as the grid has levels.

    Args:
        bins: How finely the magnitudes are counted.

    Raises:
        ValueError: `bins` is less than 512.
    """

    name: ClassVar[str] = "entropy"
    bins: int = 2048

    def __post_init__(self) -> None:
        if self.bins < 512:
            raise ValueError(f"bins must be at least 512, not {self.bins}")

    def find(self, counts: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return histogram.least_divergence(counts, low, high, grid, self.bins)
