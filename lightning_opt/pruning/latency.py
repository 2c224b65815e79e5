"""Cut where it saves time: the widths that lose least importance for each millisecond."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt.forward import Inputs
from lightning_opt.pruning.layer_times import AnalyticTimes, Layer, MeasuredTimes, Times, layers_of, time_in_torch
from lightning_opt.pruning.structure import Group, Structure
from lightning_opt.pruning.widths import Sizes, Structures, least_size

__all__ = ["AnalyticTimes", "LatencyAware", "Layer", "MeasuredTimes", "Times", "layers_of", "time_in_torch"]


@dataclass(frozen=True)
class LatencyAware(Sizes):
    """Greedy: again and again cut where the least importance is lost for each millisecond that is saved.

    With it the ratio is the share of the layers' time that goes, or of their floating point operations. The loss of a
    group is minus the logarithm of the share of its scores that stays: what passes through the model is a product over
    its layers, so that half of two layers is cheaper than all but a tenth of one, and scores need not be comparable
    across groups. In the manner of Shen, Yin, Molchanov, Mao, Liu, Alvarez (2022), "Structural Pruning via
    Latency-Saliency Knapsack" (HALP), arXiv 2210.06659, with a greedy choice in place of their knapsack solver.

    Args:
        layers: As `layers_of(model, example_inputs)` finds them; `for_model` finds them when not given.
        times: How long a layer takes at a width.
        max_ratio: No group loses a larger share of its units than this.
        of: What the ratio is of: "time", or "flops" for the fastest model of a given size. Either way time is what
            decides where to cut.

    Raises:
        ValueError: There is no layer, `max_ratio` is not in (0, 1], or `of` is not known.
    """

    layers: Sequence[Layer] | None = None
    times: Times = field(default_factory=AnalyticTimes)
    max_ratio: float = 0.9
    of: Literal["time", "flops"] = "time"

    def __post_init__(self) -> None:
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty: the model has no convolution or linear layer whose time is known")
        if not 0.0 < self.max_ratio <= 1.0:
            raise ValueError(f"max_ratio must be more than 0 and at most 1, not {self.max_ratio}")
        if self.of not in ("time", "flops"):
            raise ValueError(f"of={self.of!r}: the ratio is of the 'time' or of the 'flops'")

    @override
    def for_model(self, model: nn.Module, example_inputs: Inputs) -> "LatencyAware":
        return self if self.layers is not None else replace(self, layers=layers_of(model, example_inputs))

    def sizes(
        self,
        structure: Structure,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        *,
        ratio: float,
        pattern: Structures,
    ) -> dict[str, int]:
        if self.layers is None:
            raise ValueError("layers is not given: use for_model(model, example_inputs)")
        state = _Greedy(self, structure, groups, scores, pattern)
        whole = state.left()
        while state.left() > (1.0 - ratio) * whole * (1 + 1e-12):
            if not state.cut_once():
                most = 1.0 - state.left() / whole
                raise ValueError(
                    f"ratio={ratio:g} of the {self.of} cannot be reached: what may be cut saves {most:.3f}"
                )
        return state.kept


class _Greedy:
    """The widths so far, and the best next cut of each group."""

    def __init__(
        self,
        how: LatencyAware,
        structure: Structure,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        pattern: Structures,
    ) -> None:
        self.how, self.groups = how, {group.name: group for group in groups}
        self.kept = {group.name: group.size for group in groups}
        self.lengths = Lengths(groups)
        self.losses = {group.name: _losses(scores[group.name]) for group in groups}
        self.step = {group.name: pattern.step(group) for group in groups}
        self.least = {g.name: least_size(g, pattern, share=1.0 - how.max_ratio) for g in groups}
        self.known_ms: dict[tuple[int, int, int], float] = {}
        self.touched: dict[str, list[Layer]] = defaultdict(list)
        self.layers = how.layers or ()
        for layer in self.layers:
            for name in self.lengths.groups_of(layer.weight):
                self.touched[name].append(layer)
        self.layer_ms = {id(layer): self._ms(layer) for layer in self.layers}
        self.total_ms = sum(self.layer_ms.values())
        self.next: dict[str, tuple[float, int] | None] = {name: self._best_cut(name) for name in self.groups}

    def left(self) -> float:
        """Return what is left of what the ratio is of."""
        if self.how.of == "time":
            return self.total_ms
        return sum(layer.flops(*self._widths(layer)) for layer in self.layers)

    def _ms(self, layer: Layer) -> float:
        place = (id(layer), *self._widths(layer))
        if place not in self.known_ms:
            self.known_ms[place] = self.how.times.ms(layer, *place[1:])
        return self.known_ms[place]

    def _widths(self, layer: Layer) -> tuple[int, int]:
        outputs = self.lengths.at(layer.weight, layer.out_dim, layer.shape[layer.out_dim], self.kept)
        inputs = outputs
        if not layer.is_depthwise:
            inputs = self.lengths.at(layer.weight, layer.in_dim, layer.shape[layer.in_dim], self.kept)
        return outputs, inputs

    def _best_cut(self, name: str) -> tuple[float, int] | None:
        """Return the least loss per millisecond of the smaller sizes of a group, and that size."""
        now, size, best = self.kept[name], self.groups[name].size, None
        before = sum(self.layer_ms[id(layer)] for layer in self.touched[name])
        nearest = (now - 1) // self.step[name]
        for further in _looks(nearest):
            smaller = (nearest - further) * self.step[name]
            if smaller < self.least[name]:
                break
            self.kept[name] = smaller
            saved = before - sum(self._ms(layer) for layer in self.touched[name])
            lost = self.losses[name][size - smaller] - self.losses[name][size - now]
            if saved > 0 and (best is None or lost / saved < best[0]):
                best = (lost / saved, smaller)
        self.kept[name] = now
        return best

    def cut_once(self) -> bool:
        """Make the cheapest cut; False if there is none."""
        cuts = [(cut[0], name, cut[1]) for name, cut in self.next.items() if cut is not None]
        if not cuts:
            return False
        _, name, smaller = min(cuts)
        self.kept[name] = smaller
        for layer in self.touched[name]:
            self.layer_ms[id(layer)] = self._ms(layer)
        self.total_ms = sum(self.layer_ms.values())
        neighbours = {other for layer in self.touched[name] for other in self.lengths.groups_of(layer.weight)}
        for other in neighbours | {name}:
            self.next[other] = self._best_cut(other)
        return True


class Lengths:
    """How long an axis is once some units are gone.

    Units of several groups lie beside each other along an axis (concatenation), or cross (heads and their dims).

    Args:
        groups: Those that may be cut.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._at: dict[tuple[str, int], list[tuple[Group, Tensor]]] = defaultdict(list)
        self._names: dict[str, list[str]] = defaultdict(list)
        for group in groups:
            for member in group.members:
                self._at[member.tensor, member.dim].append((group, member.indices))
                if group.name not in self._names[member.tensor]:
                    self._names[member.tensor].append(group.name)
        self._cross = {place: _overlap(parts) for place, parts in self._at.items()}

    def groups_of(self, tensor: str) -> list[str]:
        """Return the names of the groups that cut a tensor."""
        return self._names.get(tensor, [])

    def at(self, tensor: str, dim: int, full: int, kept: Mapping[str, int]) -> int:
        """Return the length of a dim of a tensor, `full` as it is, with `kept` units left of each group."""
        parts = self._at.get((tensor, dim))
        if not parts:
            return full
        if not self._cross[tensor, dim]:
            return full - sum((group.size - kept[group.name]) * indices.shape[1] for group, indices in parts)
        left = float(full)
        for group, indices in parts:
            left *= 1.0 - indices.numel() / full * (1.0 - kept[group.name] / group.size)
        return max(round(left), 1)


def _looks(steps: int) -> Iterator[int]:
    """Yield how many steps beyond the nearest to look: each within a lane of 16, then further and further apart."""
    further = 0
    while further <= steps:
        yield further
        further += 1 if further < 16 else max(8, further // 3)


def _losses(scores: Tensor) -> list[float]:
    """Return minus the logarithm of the share that is left when 0, 1, ... of the units with the lowest scores go."""
    rising = scores.double().sort().values
    rising = rising - rising[0].clamp(max=0.0)  # scores that may be negative are counted from the lowest
    if rising.sum() <= 0:
        rising = torch.ones_like(rising)
    left = 1.0 - torch.cumsum(rising, 0) / rising.sum()
    return [0.0, *(-left.clamp(min=1e-12).log()).tolist()]


def _overlap(parts: Sequence[tuple[Group, Tensor]]) -> bool:
    together = torch.cat([indices.flatten() for _, indices in parts])
    return len(together) > len(together.unique())
