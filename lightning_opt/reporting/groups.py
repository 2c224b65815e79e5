"""Put runs that differ only by seed together, and take mean and spread of what they measured."""

import hashlib
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.reporting import text
from lightning_opt.reporting.record import read_record

Record = Mapping[str, Any]
_NOT_THE_METHOD = ("seed", "run_dir", "run_root")


@dataclass(frozen=True)
class Run:
    """One run folder and its record."""

    folder: Path
    record: Record


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed, or a single run.

    Attributes:
        label: What sets it apart from the other groups.
        runs: In the order given.
    """

    label: str
    runs: Sequence[Run]

    def values(self, read: Callable[[Record], float | None]) -> list[float]:
        """Read one number from every run; runs that lack it are left out."""
        found = (read(run.record) for run in self.runs)
        return [value for value in found if value is not None and math.isfinite(value)]


def mean(values: Sequence[float]) -> float | None:
    """Average; None of nothing."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float:
    """Give the sample standard deviation (n - 1); zero for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def group_runs(folders: Iterable[Path | str]) -> list[Group]:
    """Read run folders and group those whose configs differ only by seed and folder.

    The config is the run folder's `.hydra/resolved.json` or, where there is none, the command. A sweep's command names
    many configs at once, so a run known by such a command stands alone.

    Raises:
        StorageError: A folder has no readable record.
        ConfigError: A record was written by a newer version of this package.
    """
    runs = [Run(Path(folder), read_record(folder)) for folder in folders]
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_method(run), []).append(run)
    labels = _labels(list(found.values()))
    return [Group(label, members) for label, members in zip(labels, found.values(), strict=True)]


def _method(run: Run) -> str:
    """Give runs of one method the same key."""
    try:
        config = json.loads((run.folder / ".hydra" / "resolved.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        words = shlex_words(run.record["command"])
        if {"-m", "--multirun"} & set(words):
            return str(run.folder.resolve())
        return json.dumps(sorted(_telling(words)))
    seed = config.get("seed") if isinstance(config, dict) else None
    return hashlib.sha256(json.dumps(_without_seed(config, seed), sort_keys=True).encode()).hexdigest()


def _without_seed(value: Any, seed: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if name not in _NOT_THE_METHOD[1:]}
        return {name: _without_seed(part, seed) for name, part in kept.items() if not (name == "seed" and part == seed)}
    return [_without_seed(part, seed) for part in value] if isinstance(value, list) else value


def shlex_words(command: str) -> list[str]:
    """Split a command line; one that cannot be split is one word."""
    try:
        return shlex.split(command)
    except ValueError:
        return [command]


def _telling(words: Sequence[str]) -> list[str]:
    """Drop the words that say where and with which seed, not what."""
    return [word for word in words if word.lstrip("+~").split("=", 1)[0] not in _NOT_THE_METHOD]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Name each group by the words of its command that not all groups share, else by its folder."""
    words = [_telling(shlex_words(members[0].record["command"])) for members in groups]
    common = set.intersection(*map(set, words)) if words else set()
    labels = []
    for members, mine in zip(groups, words, strict=True):
        telling = " ".join(word.lstrip("+") for word in mine if word not in common)
        labels.append(text.plain(telling or members[0].folder.resolve().name, limit=48))
    twice = {label for label in labels if labels.count(label) > 1}
    return [
        text.plain(f"{label} ({members[0].folder.resolve().name})", limit=64) if label in twice else label
        for label, members in zip(labels, groups, strict=True)
    ]
