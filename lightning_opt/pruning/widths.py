"""How many units each group of structures keeps, so that widths are what engines like."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs
from lightning_opt.pruning.structure import Group, Structure

KINDS = ("channels", "heads", "hidden")
_WHOLE_UNITS = ("heads", "queries", "inner")  # their number is no width that an engine sees


@dataclass(frozen=True)
class Structures:
    """Which structures may go, and to which widths.

    Args:
        kinds: Of "channels" (of convolutions), "heads" (with grouped queries: a key with its queries), "hidden"
            (between linear layers), "queries" (per key), "inner" (within each group of a convolution), "head_dim",
            "width" (of a residual stream) and "embedding".
        round_to: Widths stay multiples of it, or as they are; it does not count heads. 16 suits convolutions on CPUs.
        min_keep: Units that each group keeps in any case; with None a share that empties a group is refused.
        exact: Leave out groups over which a norm or a mean runs: there a smaller model is not the masked one.

    Raises:
        ValueError: `round_to` or `min_keep` is not a positive whole number, or `kinds` is empty.
    """

    kinds: Sequence[str] = KINDS
    round_to: int = 16
    min_keep: int | None = None
    exact: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        if not self.kinds:
            raise ValueError("kinds is empty: name at least one kind of structure, such as 'channels'")
        for name, value in (("round_to", self.round_to), ("min_keep", self.min_keep)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")

    def of(self, structure: Structure) -> tuple[Group, ...]:
        """Return the groups that may be cut.

        Raises:
            ValueError: There are none; the message says what there is, and why the rest is frozen.
        """
        found = tuple(
            g for g in structure.groups if g.kind in self.kinds and g.size > 1 and (g.exact or not self.exact)
        )
        if not found:
            raise ValueError(
                f"kinds={tuple(self.kinds)!r}: the model has nothing of these to prune. {_others(structure)}"
            )
        return found

    def step(self, group: Group) -> int:
        """Return how many units make a width that is a multiple of `round_to`."""
        if group.kind in _WHOLE_UNITS:
            return 1
        entries = min((member.indices.shape[1] for member in group.members if member.is_parameter), default=1)
        return self.round_to // math.gcd(self.round_to, entries)


class Sizes(ABC):
    """Says how many units each group keeps; subclasses are frozen dataclasses."""

    @abstractmethod
    def sizes(
        self,
        structure: Structure,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        *,
        ratio: float,
        pattern: Structures,
    ) -> dict[str, int]:
        """Return the number of units that each group keeps.

        Args:
            structure: What was traced.
            groups: Those that may be cut.
            scores: `(size,)` by group name, larger = keep.
            ratio: The share that goes.
            pattern: Widths and least numbers to respect.

        Raises:
            ValueError: The ratio cannot be reached.
        """

    def for_model(self, model: nn.Module, example_inputs: Inputs) -> "Sizes":
        """Return the rule with what it must know of the model, such as its layers."""
        return self

    def most(self, groups: Sequence[Group], pattern: Structures) -> float:
        """Return the largest ratio that can be asked for."""
        return 1.0 - 1e-6


@dataclass(frozen=True)
class UniformSizes(Sizes):
    """Every group loses the same share of its units."""

    def sizes(
        self,
        structure: Structure,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        *,
        ratio: float,
        pattern: Structures,
    ) -> dict[str, int]:
        found = {}
        for group in groups:
            keep, step = (1.0 - ratio) * group.size, pattern.step(group)
            if keep < 0.5 and step == 1 and pattern.min_keep is None:
                raise ValueError(
                    f"ratio={ratio:g} would leave nothing of the {group.size} units of {group.name!r}; lower it, "
                    "ignore this part of the model, or set min_keep=1"
                )
            found[group.name] = nearest_size(keep, group, pattern)
        return found


@dataclass(frozen=True)
class GlobalSizes(Sizes):
    """All units compete: those with the lowest scores go, wherever they are. Scores must be comparable across groups.

    Args:
        max_ratio: No group loses a larger share than this.

    Raises:
        ValueError: `max_ratio` is not in (0, 1].
    """

    max_ratio: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 < self.max_ratio <= 1.0:
            raise ValueError(f"max_ratio must be more than 0 and at most 1, not {self.max_ratio}")

    def sizes(
        self,
        structure: Structure,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        *,
        ratio: float,
        pattern: Structures,
    ) -> dict[str, int]:
        ranked: list[tuple[float, int]] = []
        for place, group in enumerate(groups):
            loses = self._loses(group, pattern)
            ranked += [(score, place) for score in sorted(scores[group.name].tolist())[:loses]]
        going = round(ratio * sum(group.size for group in groups))
        if going > len(ranked):
            raise ValueError(
                f"ratio={ratio:g} cannot be reached while no group loses more than {self.max_ratio:g} of it"
            )
        lost = [0] * len(groups)
        for _, place in sorted(ranked)[:going]:
            lost[place] += 1
        return {g.name: nearest_size(g.size - gone, g, pattern) for g, gone in zip(groups, lost, strict=True)}

    def most(self, groups: Sequence[Group], pattern: Structures) -> float:
        return sum(self._loses(group, pattern) for group in groups) / sum(group.size for group in groups)

    def _loses(self, group: Group, pattern: Structures) -> int:
        return group.size - least_size(group, pattern, share=1.0 - self.max_ratio)


def best_units(scores: Tensor, count: int) -> list[int]:
    """Return the positions of the `count` largest scores, rising; of equal ones the first."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())


def nearest_size(wanted: float, group: Group, pattern: Structures) -> int:
    """Return the allowed number of units next to `wanted`; of two equally near the larger."""
    step, least = pattern.step(group), least_size(group, pattern)
    below = max(math.floor(wanted / step + 1e-9), math.ceil(least / step)) * step
    allowed = [size for size in (below, below + step, group.size) if size <= group.size]
    return min(allowed, key=lambda size: (abs(size - wanted) - 1e-9 * size, -size))


def least_size(group: Group, pattern: Structures, *, share: float = 0.0) -> int:
    """Return how many units a group keeps at least: at least one, `min_keep`, and `share` of them."""
    return min(max(1, pattern.min_keep or 1, math.ceil(share * group.size - 1e-9)), group.size)


def _others(structure: Structure) -> str:
    groups = [f"{g.name} ({g.kind}{'' if g.exact else ', not exact'})" for g in structure.groups if g.size > 1]
    there = f"There is {', '.join(groups[:6])}; name kinds to cut these. " if groups else ""
    frozen = "; ".join(str(refusal) for refusal in structure.refused[:3])
    return f"{there}Frozen: {frozen}" if frozen else there or "No axis of its parameters is free."
