"""Read a sweep's folder: its values, what each job measured, and which points no other one beats."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.reporting.record import read_record

FILE_NAME = "sweep.json"
SCHEMA_VERSION = 1
_DIRECTIONS = ("maximize", "minimize")

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One job of a sweep.

    Attributes:
        name: Of its folder.
        number: Its place in the sweep.
        values: What each axis is set to, as words.
        command: The words that run it again.
        status: "finished", "pruned", "failed", "interrupted", "running" or "waiting".
        measures: What its run measured, as far as it came.
        error: Why it failed.
        wall_seconds: How long it took.
    """

    name: str
    number: int
    values: Mapping[str, str]
    command: Sequence[str]
    status: str
    measures: Mapping[str, float | None] = field(default_factory=dict)
    error: str | None = None
    wall_seconds: float | None = None

    def measure(self, name: str) -> float | None:
        """Return a measured number of a point that finished; None where there is none."""
        value = self.measures.get(name) if self.status == "finished" else None
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class SweepRead:
    """A sweep as its folder tells it.

    Attributes:
        folder: Where it lies.
        method: "grid" or "optuna".
        command: The line that started it.
        axes: Key to its values as typed.
        objectives: Names of what is compared, the first one first.
        directions: "maximize" or "minimize" for each.
        points: In order of their numbers.
        records: Of the points that have one, by name.
    """

    folder: Path
    method: str
    command: str
    axes: Mapping[str, str]
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    points: Sequence[Point]
    records: Mapping[str, Record]

    @property
    def finished(self) -> list[Point]:
        """Return the points that have a value of every objective."""
        return [point for point in self.points if all(point.measure(name) is not None for name in self.objectives)]

    @property
    def ranked(self) -> list[Point]:
        """Return the finished points, the best of the first objective first."""
        sign = -1.0 if self.directions[0] == "maximize" else 1.0
        return sorted(self.finished, key=lambda point: sign * (point.measure(self.objectives[0]) or 0.0))

    @property
    def front(self) -> list[Point]:
        """Return the points that no other one beats in every objective, the best of the first objective first."""
        costs = [self._costs(point) for point in self.ranked]
        kept = non_dominated(costs)
        return [point for point, is_kept in zip(self.ranked, kept, strict=True) if is_kept]

    def _costs(self, point: Point) -> list[float]:
        signs = [-1.0 if word == "maximize" else 1.0 for word in self.directions]
        return [sign * (point.measure(name) or 0.0) for sign, name in zip(signs, self.objectives, strict=True)]


def non_dominated(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Tell for each row whether no other row is at most as large everywhere and smaller somewhere.

    >>> non_dominated([[1.0, 4.0], [2.0, 2.0], [3.0, 3.0]])
    [True, True, False]
    """
    return [not any(_dominates(other, row) for other in costs) for row in costs]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def measures_of(record: Record) -> dict[str, float | None]:
    """Return what a sweep can optimise of a run: `test/METRIC`, `val`, and the student's cost."""
    student = record["models"].get("student") or {}
    values: dict[str, float | None] = {f"test/{name}": value for name, value in (student.get("quality") or {}).items()}
    values |= {name: student.get(name) for name in ("size_bytes", "params", "params_nonzero", "flops")}
    values["latency_ms"] = (student.get("latency_ms") or [{}])[0].get("p50")
    values["val"] = record.get("best_value")
    return values


def is_sweep(folder: Path) -> bool:
    """Tell whether a folder is a sweep's."""
    return (folder / FILE_NAME).is_file()


def read_sweep(folder: Path | str) -> SweepRead:
    """Read a sweep and the records of its jobs, as far as they are.

    Raises:
        StorageError: `sweep.json` is damaged.
        ConfigError: It was written by a newer version, or there is nothing to compare.
    """
    place = Path(folder) / FILE_NAME
    try:
        told = json.loads(place.read_text(encoding="utf-8"))
        version = told["schema_version"]
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"{place}: schema_version {version} is newer than {SCHEMA_VERSION}; upgrade lightning_opt"
            )
        return _read(Path(folder), told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{place} cannot be read ({type(error).__name__}: {error}); restore it") from error


def _read(folder: Path, told: Mapping[str, Any]) -> SweepRead:
    records: dict[str, Record] = {}
    points = [_point(folder, job, records) for job in told["jobs"]]
    objectives, directions = tuple(map(str, told["objectives"])), tuple(map(str, told["directions"]))
    if not objectives:
        objectives, directions = _of_records(list(records.values()))
    if len(objectives) != len(directions) or any(word not in _DIRECTIONS for word in directions):
        raise ValueError("objectives and directions do not go together")
    return SweepRead(
        folder=folder,
        method=str(told["method"]),
        command=str(told["command"]),
        axes={str(key): str(text) for key, text in told["axes"].items()},
        objectives=objectives,
        directions=directions,
        points=sorted(points, key=lambda point: point.number),
        records=records,
    )


def _of_records(records: Sequence[Record]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose what to compare the jobs of a grid without objectives by: quality, and cost where it was measured."""
    for record in records:
        known = measures_of(record)
        metric = next((name for name in known if name.startswith("test/")), None)
        if metric is None or record["status"] != "finished":
            continue
        better = record["comparison"].get("higher_is_better", True) is not False
        all_known = [measures_of(other) for other in records if other["status"] == "finished"]
        costs = [
            name for name in ("latency_ms", "size_bytes") if len({known.get(name) for known in all_known} - {None}) > 1
        ]
        return (metric, *costs), ("maximize" if better else "minimize", *("minimize" for _ in costs))
    return ("val",), ("maximize",)


def _point(folder: Path, job: Mapping[str, Any], records: dict[str, Record]) -> Point:
    name = str(job["folder"])
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"the job folder {name!r} is outside of the sweep")
    status, error, record = "waiting", job.get("error"), None
    try:
        record = read_record(folder / name)
    except StorageError:
        status = "failed" if error else "waiting"
    if record is not None:
        records[name] = record
        status, error = str(record["status"]), record.get("error") or error
    if (folder / name / ".hydra" / "pruned.json").is_file():
        status = "pruned"
    return Point(
        name=name,
        number=int(job["number"]),
        values={str(key): str(value) for key, value in job["values"].items()},
        command=[str(word) for word in job["command"]],
        status=status,
        measures=measures_of(record) if record is not None else {},
        error=str(error) if error else None,
        wall_seconds=record["wall_seconds"] if record is not None else None,
    )
