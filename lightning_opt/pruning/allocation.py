"""How sparse each tensor becomes, given how sparse all of them shall be together."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from lightning_opt.pruning.parts_ranking import Marked, are_parts, best_parts, each_on_one_rank
from lightning_opt.pruning.ranking import NotANumberError, best, count_true, falling_order


@dataclass(frozen=True)
class Allocation(ABC):
    """Shares the weights that stay out among the tensors.

    Args:
        min_density: Share of its units that each tensor keeps in any case, rounded up, and at least one unit: no layer
            is cut off by accident. Others give up as many, so that exact counts stay exact.

    Raises:
        ValueError: `min_density` is not in [0, 1).
    """

    min_density: float = field(default=0.001, kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_density < 1.0:
            raise ValueError(f"min_density must be in [0, 1), not {self.min_density}")

    @abstractmethod
    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, sparsity: float, fraction: float = 1.0
    ) -> dict[str, Tensor]:
        """Choose the units that stay.

        Args:
            units: `(units,)` scores of each tensor, larger is better.
            shapes: The tensors' shapes, `(outputs, inputs, *kernel)`.
            sparsity: Share of all weights that shall be zero in the end, in [0, 1).
            fraction: How much of the way there is gone, in [0, 1].

        Returns:
            Bool `(units,)` of each tensor.

        Raises:
            ValueError: The sparsity leaves less than `min_density` asks for.
        """

    @property
    def ranks_parts(self) -> bool:
        """Whether `keep` also chooses where each process has `Parts` of the scores; else it is given all of them."""
        return False

    def floor(self, count: int) -> int:
        """Return how many of `count` units stay in any case."""
        return min(max(math.ceil(self.min_density * count), 1), count)


@dataclass(frozen=True)
class GlobalAllocation(Allocation):
    """One ranking over all tensors: where scores are small, much goes.

    Exactly `round((1 - sparsity) * N)` of N units stay. Where units differ in size (rows, columns), the best ones stay
    whose weights together come nearest to that share.
    """

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, sparsity: float, fraction: float = 1.0
    ) -> dict[str, Tensor]:
        sparsity = sparsity * fraction
        sizes = {name: shapes[name].numel() // len(scores) for name, scores in units.items()}
        ranks = self.rank(units)
        if len(set(sizes.values())) > 1:
            return self._keep_uneven(ranks, sizes, sparsity)
        floors = {name: self.floor(len(scores)) for name, scores in units.items()}
        left = round((1.0 - sparsity) * sum(len(scores) for scores in units.values()))
        _check_floors(floors, left, sparsity, self.min_density)
        kept: dict[str, Tensor] = {}
        open_names = list(units)
        while open_names:
            kept.update(_best(ranks, open_names, left))
            short = {name: floors[name] for name in open_names if _count(kept[name]) < floors[name]}
            if not short:
                break
            kept.update(_best_of_each(ranks, short))
            left -= sum(short.values())
            open_names = [name for name in open_names if name not in short]
        return kept

    @property
    def ranks_parts(self) -> bool:
        ours = (GlobalAllocation, LAMP)
        return any(type(self).keep is kind.keep for kind in ours) and any(type(self).rank is k.rank for k in ours)

    def rank(self, units: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return scores that can be compared over all tensors; the units' own by default."""
        return units

    def _keep_uneven(self, ranks: Mapping[str, Tensor], sizes: Mapping[str, int], sparsity: float) -> dict[str, Tensor]:
        """Go down one ranking of units of different size, those that stay in any case first. Such units are few."""
        first = [_best(ranks, [name], self.floor(len(scores)))[name] for name, scores in ranks.items()]
        pairs = zip(ranks.values(), first, strict=True)
        scores = torch.cat([scores.float().masked_fill(stays, torch.inf).cpu() for scores, stays in pairs])
        size = torch.cat([torch.full((len(scores),), sizes[name]) for name, scores in ranks.items()])
        order = scores.argsort(descending=True, stable=True)
        off_target = (size[order].cumsum(0) - round((1.0 - sparsity) * int(size.sum()))).abs()
        count = max(int(off_target.argmin()) + 1, sum(int(stays.count_nonzero()) for stays in first))
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[order[:count]] = True
        parts = chosen.split([len(scores) for scores in ranks.values()])
        return {name: part.to(ranks[name].device) for name, part in zip(ranks, parts, strict=True)}


@dataclass(frozen=True)
class LAMP(GlobalAllocation):
    """One ranking over all tensors of scores that know how much of their tensor is left.

    Lee, Park, Mo, Ahn, Shin (2021), "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611,
    equation 3: a squared weight by the sum of all squared weights of its tensor that are not smaller. The largest of
    each tensor has 1, so no tensor can be emptied. Any score takes the place of the magnitude.
    """

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, sparsity: float, fraction: float = 1.0
    ) -> dict[str, Tensor]:
        shares = super().keep(units, shapes, sparsity=sparsity, fraction=fraction)
        # The order within a tensor is that of its scores, so its count is all that the ranking has to give.
        return _best_of_each(units, {name: _count(kept) for name, kept in shares.items()})

    def rank(self, units: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if are_parts(units):
            return each_on_one_rank(units, lamp_scores)  # type: ignore[return-value]  # see `Allocation.ranks_parts`
        return {name: lamp_scores(scores) for name, scores in units.items()}


def lamp_scores(scores: Tensor) -> Tensor:
    """Return the LAMP scores of `(units,)` scores, in falling order (see `LAMP`).

    Negative scores count as 0; infinite ones stay infinite and are left out of the sums.

    >>> lamp_scores(torch.tensor([1.0, 2.0, 1.0]))
    tensor([1.0000, 0.2000, 0.1667])
    """
    falling = falling_order(scores).double()
    squares = falling.clamp(min=0).square().masked_fill_(falling == torch.inf, 0)
    share = squares / squares.cumsum(0).clamp_(min=torch.finfo(torch.float64).tiny)
    return share.masked_fill_(falling == torch.inf, torch.inf).float()


@dataclass(frozen=True)
class PerTensor(Allocation):
    """Base of allocations that know each tensor's density before they see a score.

    On the way of a schedule each tensor goes the same fraction of its own way.
    """

    @abstractmethod
    def densities(self, shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, float]:
        """Return the share of weights that each tensor keeps.

        Args:
            shapes: The tensors' shapes, `(outputs, inputs, *kernel)`.
            sparsity: Share of all weights that shall be zero, in [0, 1).
        """

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, sparsity: float, fraction: float = 1.0
    ) -> dict[str, Tensor]:
        counts = {}
        for name, density in self.densities(shapes, sparsity).items():
            total = len(units[name])
            counts[name] = max(round((1.0 - fraction * (1.0 - density)) * total), self.floor(total))
        return _best_of_each(units, counts)

    @property
    def ranks_parts(self) -> bool:
        return type(self).keep is PerTensor.keep


@dataclass(frozen=True)
class Uniform(PerTensor):
    """The same sparsity in every tensor: of each, `round((1 - sparsity) * units)` units stay."""

    def densities(self, shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, float]:
        return dict.fromkeys(shapes, 1.0 - sparsity)


@dataclass(frozen=True)
class ERK(PerTensor):
    """Keep more of small tensors: Erdos-Renyi kernel.

    Evci, Gale, Menick, Castro, Elsen (2020), "Rigging the Lottery", arXiv 1911.11134, section 3: the density of a
    tensor is proportional to (inputs + outputs + kernel width + kernel height) / (inputs * outputs * width * height).
    Tensors for which that gives more than 1 stay dense, and the others share what is left.

    Args:
        min_density: See `Allocation`.
    """

    def densities(self, shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, float]:
        raw = {name: sum(shape) / shape.numel() for name, shape in shapes.items()}
        dense: set[str] = set()
        while True:
            left = (1.0 - sparsity) * sum(shape.numel() for shape in shapes.values())
            left -= sum(shapes[name].numel() for name in dense)
            share = sum(raw[name] * shapes[name].numel() for name in shapes if name not in dense)
            scale = left / share if share else 0.0
            over = {name for name in shapes if name not in dense and scale * raw[name] > 1.0}
            if not over:
                return {name: 1.0 if name in dense else max(scale * raw[name], 0.0) for name in shapes}
            dense |= over


@dataclass(frozen=True)
class PerLayer(PerTensor):
    """A sparsity by hand for some tensors; the rest has the overall one.

    Args:
        sparsities: `{name pattern: sparsity}` with `*` and `?`; the first that matches a tensor counts. 0 leaves it
            dense.
        min_density: See `Allocation`.

    Raises:
        ValueError: A sparsity is not in [0, 1).
    """

    sparsities: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern, sparsity in self.sparsities.items():
            if not 0.0 <= sparsity < 1.0:
                raise ValueError(f"sparsities[{pattern!r}] must be in [0, 1), not {sparsity}")

    def __hash__(self) -> int:
        return hash((tuple(self.sparsities.items()), self.min_density))

    def check(self, names: list[str]) -> None:
        """Refuse a pattern that matches no tensor.

        Raises:
            ValueError: Naming the pattern and near names.
        """
        for pattern in self.sparsities:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
                raise ValueError(f"sparsities[{pattern!r}] matches no pruned tensor; near names: {', '.join(near)}")

    def densities(self, shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, float]:
        self.check(list(shapes))
        return {name: 1.0 - self._sparsity(name, sparsity) for name in shapes}

    def _sparsity(self, name: str, otherwise: float) -> float:
        return next((value for pattern, value in self.sparsities.items() if fnmatchcase(name, pattern)), otherwise)


def _best(ranks: Mapping[str, Tensor], names: list[str], count: int) -> dict[str, Tensor]:
    """Mark the best of some tensors together."""
    return _best_in([(names, count)], ranks)


def _best_of_each(ranks: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Mark the best of each tensor by itself."""
    return _best_in([([name], count) for name, count in counts.items()], ranks)


def _best_in(groups: list[tuple[list[str], int]], ranks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mark the best of several groups of tensors."""
    every = [name for names, _ in groups for name in names]
    if are_parts(ranks):
        found: Any = _naming(every, lambda: best_parts([([ranks[n] for n in names], count) for names, count in groups]))
    else:
        found = [_naming(names, lambda: best([ranks[n] for n in names], count)) for names, count in groups]  # noqa: B023
    return dict(zip(every, (mask for masks in found for mask in masks), strict=True))


def _naming(names: list[str], choose: Callable[[], Any]) -> Any:
    try:
        return choose()
    except NotANumberError as error:
        raise ValueError(
            f"the scores of {names[error.place]} hold NaN; weights or gradients of that tensor are not finite"
        ) from error


def _count(mask: Any) -> int:
    return mask.count if isinstance(mask, Marked) else count_true(mask)


def _check_floors(floors: Mapping[str, int], left: int, sparsity: float, min_density: float) -> None:
    if sum(floors.values()) > left:
        raise ValueError(
            f"sparsity {sparsity:g} leaves {left} units, but min_density {min_density:g} keeps {sum(floors.values())} "
            f"in {len(floors)} tensors; lower one of the two"
        )
