"""How the sparsity grows between the start and the end of pruning.

A schedule says what fraction of the final sparsity holds at a progress in [0, 1] of the pruning's own time.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Schedule(ABC):
    """A rising fraction of the final sparsity.

    Attributes:
        rewind_points: Progress values at which weights return to those saved at `rewind_to`; none by default.
        rewind_to: Progress at which the weights are saved to return to.
    """

    rewind_to: float = 0.0

    @property
    def rewind_points(self) -> tuple[float, ...]:
        """Progress values in (0, 1] at which the weights are taken back."""
        return ()

    @abstractmethod
    def at(self, progress: float) -> float:
        """Return the fraction of the final sparsity, in [0, 1], at `progress`; outside [0, 1] it is held."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once, at the start."""

    def at(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """The same share at every step.

    Args:
        initial: Fraction at the start, in [0, 1].
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_initial(self.initial)

    def at(self, progress: float) -> float:
        return self.initial + (1.0 - self.initial) * _clip(progress)


@dataclass(frozen=True)
class Cubic(Schedule):
    """Much at first, when weights are plenty, and little at the end.

    Zhu, Gupta (2017), "To prune, or not to prune", arXiv 1710.01878, equation 1: with s_i = `initial` * s_f,
    s = s_f + (s_i - s_f) * (1 - progress)^3.

    Args:
        initial: Fraction at the start, in [0, 1].
    """

    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_initial(self.initial)

    def at(self, progress: float) -> float:
        return 1.0 + (self.initial - 1.0) * (1.0 - _clip(progress)) ** 3


@dataclass(frozen=True)
class Exponential(Schedule):
    """Remove the same share of what is left at every step.

    The fraction is (1 - exp(-rate * progress)) / (1 - exp(-rate)). With rate = -log(1 - final sparsity), 2.3 for 0.9,
    the density falls exactly as density ** progress; a larger rate takes more at first.

    Args:
        rate: How fast it slows down, more than 0.
    """

    rate: float = -math.log(0.1)

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate must be more than 0, not {self.rate}")

    def at(self, progress: float) -> float:
        return math.expm1(-self.rate * _clip(progress)) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Iterative(Schedule):
    """Prune in rounds, each followed by training; with `rewind`, from the early weights (lottery tickets).

    Frankle, Carbin (2019), "The Lottery Ticket Hypothesis", arXiv 1803.03635, section 2: at the end of each round the
    same share of the weights that are left goes, and the ones that stay return to their first values. Frankle,
    Dziugaite, Roy, Carbin (2020), "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671:
    return to the values of an early step instead of the first, as larger networks need. The i-th of n rounds ends
    at progress i / n, the last one with the final sparsity: leave time to train behind the end of pruning.

    Args:
        rounds: How often to prune, at least 1.
        rewind: Take the weights back after each round.
        rewind_to: Progress at which the weights are saved, in [0, 1 / rounds).
        share: Share of what is left that each round removes, in (0, 1). The final sparsity scales it: it is met exactly
            where 1 - (1 - share) ** rounds is the final sparsity, as 0.2 in 10 rounds for 0.893.

    Raises:
        ValueError: An argument is out of range.
    """

    rounds: int = 5
    rewind: bool = True
    rewind_to: float = 0.0
    share: float = 0.2

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if not 0.0 <= self.rewind_to < 1.0 / self.rounds:
            raise ValueError(f"rewind_to must be in [0, 1 / rounds), before the first round ends; got {self.rewind_to}")
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share must be in (0, 1), not {self.share}")

    @property
    def rewind_points(self) -> tuple[float, ...]:
        return tuple(done / self.rounds for done in range(1, self.rounds + 1)) if self.rewind else ()

    def at(self, progress: float) -> float:
        done = math.floor(_clip(progress) * self.rounds + 1e-9)
        return (1.0 - (1.0 - self.share) ** done) / (1.0 - (1.0 - self.share) ** self.rounds)


def _clip(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


def _check_initial(initial: float) -> None:
    if not 0.0 <= initial <= 1.0:
        raise ValueError(f"initial must be in [0, 1], a fraction of the final sparsity; got {initial}")
