"""Exchange weights while the density stays: drop the weakest, grow new ones."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_opt.pruning.patterns import Element, Pattern
from lightning_opt.pruning.ranking import best
from lightning_opt.pruning.selection import turn

_ELEMENT = Element()


@dataclass(frozen=True)
class Regrow(ABC):
    """Drops and grows the same number of units in every tensor.

    Args:
        fraction: Share of the kept units that is exchanged at the first update, in (0, 1).

    Raises:
        ValueError: `fraction` is out of range.
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"fraction must be in (0, 1), not {self.fraction}")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the evidence that growing reads."""
        return frozenset()

    def fraction_at(self, progress: float) -> float:
        """Return the share that is exchanged at `progress` in [0, 1]."""
        return self.fraction

    @abstractmethod
    def growth(self, name: str, weight: Tensor, gradient: Tensor | None, seed: int) -> Tensor:
        """Score the weights for coming back, of the weight's shape; larger comes first."""

    def swap(
        self,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor] | None = None,
        *,
        progress: float,
        pattern: Pattern = _ELEMENT,
        inputs_first: Collection[str] = (),
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Return new masks with as many units in each tensor as before.

        What was just dropped may come back at once, if it is the best to grow; its weight is then untouched. What comes
        back otherwise starts at zero, for it was masked until now.

        Args:
            masks: Bool masks so far; tensors without zeros are returned as they are.
            weights: The weights of the same names.
            gradients: Gradients of the loss by all weights, masked ones too, where `needs` says so.
            progress: Progress of the exchange, in [0, 1].
            pattern: The units; one that fixes its density (N:M) can't be exchanged.
            inputs_first: See `select`.
            seed: Decides what chance decides; another one at each update, the same on all ranks.

        Raises:
            ValueError: Gradients are missing, or the pattern is N:M.
        """
        if pattern.density is not None:
            raise ValueError(f"{pattern} can't be regrown: its groups are chosen one by one; use Element() or Block()")
        new = {}
        for name, mask in masks.items():
            gradient = None if gradients is None else gradients.get(name)
            grow = self.growth(name, weights[name].detach(), gradient, seed)
            values = [turn(name, v, pattern, inputs_first) for v in (mask.float(), weights[name].detach().abs(), grow)]
            kept = pattern.pool(values[0]) > 0
            chosen = self._swap_units(kept, pattern.pool(values[1].float()), pattern.pool(values[2].float()), progress)
            new[name] = turn(name, pattern.expand(chosen, values[0].shape), pattern, inputs_first)
        return new

    def _swap_units(self, kept: Tensor, drop: Tensor, grow: Tensor, progress: float) -> Tensor:
        """Keep the strongest of `(units,)`, then fill up to the same number by `grow`."""
        total = int(kept.count_nonzero())
        moved = min(int(self.fraction_at(progress) * total), len(kept) - total)
        stays = best([drop.masked_fill(~kept, -torch.inf)], total - moved)[0]
        return stays | best([grow.masked_fill(stays, -torch.inf)], moved)[0]


@dataclass(frozen=True)
class RigL(Regrow):
    """Grow where the gradient is largest.

    Evci, Gale, Menick, Castro, Elsen (2020), "Rigging the Lottery: Making All Tickets Winners", arXiv 1911.11134,
    algorithm 1; the share follows the cosine of section 3, fraction / 2 * (1 + cos(pi * progress)).

    Args:
        fraction: Share that is exchanged at first; the authors use 0.3.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gradient"})

    def fraction_at(self, progress: float) -> float:
        return self.fraction / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))

    def growth(self, name: str, weight: Tensor, gradient: Tensor | None, seed: int) -> Tensor:
        if gradient is None:
            raise ValueError(f"RigL needs the gradient of {name}, masked weights included")
        return gradient.detach().abs()


@dataclass(frozen=True)
class SET(Regrow):
    """Grow at random.

    Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta (2018), "Scalable training of artificial neural networks with
    adaptive sparse connectivity inspired by network science", arXiv 1707.04780, algorithm 2: the weights nearest to
    zero go, as many others come, at a constant share.

    Args:
        fraction: Share that is exchanged; the authors use 0.3.
    """

    def growth(self, name: str, weight: Tensor, gradient: Tensor | None, seed: int) -> Tensor:
        # The generator of the CPU gives the same numbers on every rank and device.
        generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 20) ^ seed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
