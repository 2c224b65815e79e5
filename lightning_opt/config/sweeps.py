"""The space of a sweep: what varies, how far, and the words that put one point of it on a command line.

The syntax is Hydra's own: `model=a,b`, `choice(a,b)`, `range(1,9,2)`, `interval(1e-4,1e-2)`, `int(interval(1,8))` and
`tag(log, interval(...))`, on the command line or as text under `sweep.params`.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    Glob,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    ValueType,
)
from hydra.errors import HydraException

from lightning_opt.config.compose import normalise
from lightning_opt.errors import ConfigError

Number = int | float
Point = dict[str, str]  # what each axis is set to, as it stands behind the equals sign
_LONGEST_NAME = 100
_MOST_TRIED = 16  # values of one axis that are tried one by one before the first job


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One key that a sweep varies.

    Attributes:
        key: As typed, a plus included.
        text: Its values as typed.
        values: All of them as words; None where there is no end of them.
        low: Smallest number of an interval or a range.
        high: Largest, included.
        step: Between the numbers of a range; None for an interval.
        log: Draw evenly over the logarithm.
        whole: Whole numbers only.
    """

    key: str
    text: str
    values: tuple[str, ...] | None = None
    low: Number | None = None
    high: Number | None = None
    step: Number | None = None
    log: bool = False
    whole: bool = False

    @property
    def name(self) -> str:
        """Return the key without its plus."""
        return self.key.lstrip("+")

    @property
    def is_numeric(self) -> bool:
        """Tell whether this is a range or an interval, not a list."""
        return self.low is not None

    def tried(self) -> list[str]:
        """Return what is tried before the first job: every value of a short list, the ends of all else."""
        if self.values is not None and len(self.values) <= _MOST_TRIED:
            return list(self.values)
        if self.is_numeric:
            return [as_word(end) for end in (self.low, self.high) if end is not None]
        assert self.values is not None
        return sorted(self.values, key=_by_number)[:: max(1, len(self.values) - 1)]


@dataclass(frozen=True, kw_only=True)
class Space:
    """The words of a sweep's command line: those that stand, and the axes.

    Attributes:
        fixed: Words that every job gets.
        axes: In the order typed; those of `sweep.params` first.
    """

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    def words(self, point: Mapping[str, str]) -> list[str]:
        """Return the command line of one point."""
        words = [normalise(f"{axis.key}={point[axis.name]}") for axis in self.axes]
        # A debug option has the last word, wherever it was typed.
        return sorted([*self.fixed, *words], key=lambda word: word.startswith("+debug="))

    def grid(self) -> list[Point]:
        """Return every combination, the last axis fastest.

        Raises:
            ConfigError: An axis has no end of values.
        """
        for axis in self.axes:
            if axis.values is None:
                raise ConfigError(
                    f"{axis.key}={axis.text}: a grid needs single values; list them, or add sweep=optuna to draw them"
                )
        return [self._point(values) for values in product(*(axis.values or () for axis in self.axes))]

    def corners(self, most: int) -> list[Point]:
        """Return points that stand for the whole space: all combinations of what is tried, or each value once.

        Args:
            most: Combinations above which each value is tried once, all else at the first one.
        """
        tried = [axis.tried() for axis in self.axes]
        combinations = [self._point(values) for values in islice(product(*tried), most + 1)]
        if len(combinations) <= most:
            return combinations
        first = [values[0] for values in tried]
        single = [
            [*first[:place], value, *first[place + 1 :]] for place, values in enumerate(tried) for value in values[1:]
        ]
        return [self._point(values) for values in [first, [values[-1] for values in tried], *single]]

    def _point(self, values: Sequence[str]) -> Point:
        return {axis.name: value for axis, value in zip(self.axes, values, strict=True)}


def read_space(words: Sequence[str], params: Mapping[str, Any] | None = None, folders: Sequence[Path] = ()) -> Space:
    """Split a command line into what stands and what varies.

    Args:
        words: Overrides, none of them Hydra's own.
        params: `sweep.params`: key to values, as text or as a list; a key that is also on the command line is that.
        folders: Where a group's options are, for `glob(*)`.

    Raises:
        ConfigError: A word is not in Hydra's syntax, or an axis holds no value.
    """
    typed = [_parse(word) for word in words]
    taken = {override.get_key_element().lstrip("+") for override in typed}
    listed = [
        _parse(f"{key}={_as_text(value)}") for key, value in (params or {}).items() if key.lstrip("+") not in taken
    ]
    fixed, axes = [], []
    for override in [*listed, *typed]:
        if override.is_sweep_override():
            axes.append(_axis(override, folders))
        else:
            fixed.append(str(override.input_line))
    twice = [axis.name for place, axis in enumerate(axes) if axis.name in [other.name for other in axes[:place]]]
    if twice:
        raise ConfigError(f"{twice[0]} is swept twice on one command line; give all its values in one place")
    return Space(fixed=tuple(fixed), axes=tuple(axes))


def as_word(value: Any) -> str:
    """Return a drawn value as it stands on a command line; a float keeps all its digits."""
    return repr(value) if isinstance(value, float) else str(value)


def quoted(text: str) -> str:
    """Quote a value for Hydra's grammar."""
    return str(QuotedString(text, Quote.single).with_quotes())


def folder_name(point: Mapping[str, str]) -> str:
    """Return the folder of a point: the same values always have the same one.

    It needs no quotes on a command line. What it cannot show of the values, eight digits of their hash stand for.

    >>> folder_name({"model": "cnn", "seed": "2"})
    'model-cnn__seed-2'
    """
    shown = "__".join(f"{key}-{_shown(value)}" for key, value in point.items())
    name = re.sub(r"[^A-Za-z0-9_.+-]", "", shown)[:_LONGEST_NAME]
    if name == "__".join(f"{key}-{value}" for key, value in point.items()):
        return name or "job"
    digest = hashlib.sha256(json.dumps(dict(point), sort_keys=True).encode()).hexdigest()
    return f"{name}-{digest[:8]}"


def _shown(value: str) -> str:
    """Shorten a drawn float; words and short numbers stay."""
    if len(value) <= 8:
        return value
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def _parse(word: str) -> Override:
    try:
        parsed: Override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{word}: {first}") from error
    return parsed


def _axis(override: Override, folders: Sequence[Path]) -> Axis:
    key, text, value = override.get_key_element(), override.get_value_string(), override.value()
    if isinstance(value, IntervalSweep):
        return _interval(key, text, value)
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        values: tuple[str, ...] = _options(override, folders)
    else:
        values = tuple(override.sweep_string_iterator())
    if not values:
        raise ConfigError(f"{key}={text}: this holds no value; name at least one")
    if not isinstance(value, RangeSweep):
        return Axis(key=key, text=text, values=tuple(dict.fromkeys(values)))
    ends = sorted(_number(end) for end in (values[0], values[-1]))
    whole = all(isinstance(end, int) for end in ends)
    log = "log" in value.tags
    if log and (not whole or value.step != 1):
        raise ConfigError(
            f"{key}={text}: a range on a log scale needs whole numbers and step 1; use interval(low,high)"
        )
    return Axis(
        key=key, text=text, values=values, low=ends[0], high=ends[1], step=abs(value.step), log=log, whole=whole
    )


def _interval(key: str, text: str, value: IntervalSweep) -> Axis:
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    if not low < high:
        raise ConfigError(f"{key}={text}: the first number must be below the second")
    log = "log" in value.tags
    if log and low <= 0:
        raise ConfigError(f"{key}={text}: a log scale needs numbers above 0")
    whole = isinstance(low, int) and isinstance(high, int)
    return Axis(key=key, text=text, low=low, high=high, log=log, whole=whole)


def _options(override: Override, folders: Sequence[Path]) -> tuple[str, ...]:
    """Return the options of a group that a glob names."""
    pattern = override._value
    assert isinstance(pattern, Glob)
    group = override.key_or_group
    names = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
    return tuple(pattern.filter(names))


def _as_text(value: Any) -> str:
    """Write a value of `sweep.params` in Hydra's syntax; a list is a choice."""
    if isinstance(value, list):
        return f"choice({','.join(_as_text(item) for item in value)})"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return as_word(value)


def _number(word: str) -> Number:
    try:
        return int(word)
    except ValueError:
        return float(word)


def _by_number(word: str) -> tuple[bool, float]:
    try:
        return False, float(word)
    except ValueError:
        return True, 0.0
