"""Values that change while a run goes on: weights, temperatures, shares.

A schedule is any function of the progress in [0, 1]; these are the usual ones. Anything that takes a schedule also
takes a plain number.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Schedule: TypeAlias = Callable[[float], float]


def value_at(value: float | Schedule, progress: float) -> float:
    """Return a plain number as it is, and a schedule's value at `progress` in [0, 1].

    >>> value_at(4.0, 0.5), value_at(Linear(4.0, 1.0), 0.5)
    (4.0, 2.5)
    """
    return value(progress) if callable(value) else value


def check_value(name: str, value: float | Schedule, *, low: float, open_low: bool = False) -> None:
    """Refuse a number, or a schedule's first or last value, that is below `low` (or at it, with `open_low`).

    Raises:
        ValueError: The value is out of range or NaN.
    """
    for found in (value_at(value, 0.0), value_at(value, 1.0)):
        if not (found > low if open_low else found >= low):
            raise ValueError(f"{name} must be {'more than' if open_low else 'at least'} {low:g}, not {found}")


@dataclass(frozen=True)
class Constant:
    """Stay at `value`."""

    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """Go from `start` to `end` in a straight line between two points of the run.

    Args:
        start: Value up to `begin`.
        end: Value from `finish` on.
        begin: Progress at which the change begins, in [0, 1].
        finish: Progress at which it is over, in (begin, 1].

    Raises:
        ValueError: `begin` and `finish` are not in this order within [0, 1].
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        _check_window(self.begin, self.finish)

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * _share(progress, self.begin, self.finish)


@dataclass(frozen=True)
class Cosine:
    """Go from `start` to `end` along half a cosine: slowly at both ends, fastest in the middle.

    Args:
        start: Value up to `begin`.
        end: Value from `finish` on.
        begin: Progress at which the change begins, in [0, 1].
        finish: Progress at which it is over, in (begin, 1].

    Raises:
        ValueError: `begin` and `finish` are not in this order within [0, 1].
    """

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        _check_window(self.begin, self.finish)

    def __call__(self, progress: float) -> float:
        share = 0.5 * (1.0 - math.cos(math.pi * _share(progress, self.begin, self.finish)))
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Step:
    """Jump from one value to the next at given points of the run.

    Args:
        values: One more than there are jumps.
        at: Progress of each jump, rising; the new value holds from that point on.

    Raises:
        ValueError: The numbers do not fit together.
    """

    values: Sequence[float]
    at: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"values must hold one more number than at; found {len(self.values)} values and {len(self.at)} jumps"
            )
        if list(self.at) != sorted(self.at):
            raise ValueError(f"at must rise, not {list(self.at)}")

    def __call__(self, progress: float) -> float:
        return self.values[bisect_right(self.at, progress)]


def _check_window(begin: float, finish: float) -> None:
    if not 0.0 <= begin < finish <= 1.0:
        raise ValueError(f"begin and finish must satisfy 0 <= begin < finish <= 1, not {begin} and {finish}")


def _share(progress: float, begin: float, finish: float) -> float:
    return min(max((progress - begin) / (finish - begin), 0.0), 1.0)
