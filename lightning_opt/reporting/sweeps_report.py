"""Write a sweep's report: what was best, which points no other beats, and the command of each."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_opt.errors import ConfigError
from lightning_opt.reporting import text
from lightning_opt.reporting.page import Code, Page, Section, write_page
from lightning_opt.reporting.sweeps import Point, SweepRead, read_sweep
from lightning_opt.reporting.sweeps_figures import draw_sweep
from lightning_opt.reporting.sweeps_words import label_of, short, title_of, written
from lightning_opt.reporting.tables import Table

_MOST_ROWS = 200
_MOST_FRONT = 12


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a point must keep to.

    Attributes:
        max_latency_ms: Median latency of the student at the smallest batch.
        max_size_bytes: Of the student on disk.
        min_quality: Of the first objective that is a quality; a most where less of it is better.
    """

    max_latency_ms: float | None = None
    max_size_bytes: float | None = None
    min_quality: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.max_latency_ms, self.max_size_bytes, self.min_quality))


def render_sweep(folder: Path | str, limits: Limits | None = None) -> tuple[Path, Path]:
    """Write `report.html`, `report.md` and `figures/` of a sweep's folder.

    Args:
        folder: Holds `sweep.json` and the run folders.
        limits: What the best point must keep to.

    Returns:
        The paths of the HTML and of the Markdown report.

    Raises:
        StorageError: The sweep cannot be read, or a file could not be written.
        ConfigError: A limit is of a value that no point has.
    """
    sweep = read_sweep(folder)
    limits = limits or Limits()
    best = best_within(sweep, limits)
    page = Page(
        title=f"Sweep {text.plain(Path(folder).resolve().name, limit=60)}",
        kicker=" · ".join(_facts(sweep)),
        verdict=_verdict(sweep, limits, best),
        mood="good" if best is not None else "mixed" if sweep.finished else "open",
        caveats=_caveats(sweep),
        tiles=_tiles(sweep, best),
        warnings=_warnings(sweep),
        sections=[
            Section("Figures", figures=draw_sweep(Path(folder), sweep)),
            _best(best),
            _front(sweep),
            Section("All points", [_table(sweep, _in_order(sweep))], remarks=_how_compared(sweep)),
            _again(sweep),
        ],
    )
    return write_page(page, Path(folder), "report")


def best_within(sweep: SweepRead, limits: Limits) -> Point | None:
    """Return the best point of the first objective that keeps to the limits; None where none does.

    Raises:
        ConfigError: A limit is of a value that no point has.
    """
    tests = _tests(sweep, limits)
    for test in tests:
        if sweep.finished and all(point.measure(test.name) is None for point in sweep.finished):
            raise ConfigError(f"{test.flag}: no point of this sweep has a {test.name}; drop this limit")
    return next((point for point in sweep.ranked if all(test.holds(point) for test in tests)), None)


@dataclass(frozen=True, kw_only=True)
class _Test:
    """One limit: how it was typed, which measure it is of, and whether that must be large or small."""

    flag: str
    name: str
    limit: float
    at_least: bool = False

    def holds(self, point: Point) -> bool:
        value = point.measure(self.name)
        return value is not None and (value >= self.limit if self.at_least else value <= self.limit)

    @property
    def words(self) -> str:
        return f"{title_of(self.name)} of at {'least' if self.at_least else 'most'} {written(self.name, self.limit)}"


def _tests(sweep: SweepRead, limits: Limits) -> list[_Test]:
    tests = []
    if limits.max_latency_ms is not None:
        flag = f"max_latency_ms={limits.max_latency_ms:g}"
        tests.append(_Test(flag=flag, name="latency_ms", limit=limits.max_latency_ms))
    if limits.max_size_bytes is not None:
        flag = f"max_size_bytes={limits.max_size_bytes:g}"
        tests.append(_Test(flag=flag, name="size_bytes", limit=limits.max_size_bytes))
    if limits.min_quality is not None:
        flag = f"min_quality={limits.min_quality:g}"
        pairs = zip(sweep.objectives, sweep.directions, strict=True)
        found = next(((name, way) for name, way in pairs if name == "val" or name.startswith("test/")), None)
        if found is None:
            raise ConfigError(f"{flag}: no objective of this sweep is a quality; drop this limit")
        name, way = found
        tests.append(_Test(flag=flag, name=name, limit=limits.min_quality, at_least=way == "maximize"))
    return tests


def _facts(sweep: SweepRead) -> list[str]:
    found = [point.status for point in sweep.points]
    counted = [f"{found.count(status)} {status}" for status in dict.fromkeys(found)]
    return [sweep.method, f"{len(found)} points", *counted]


def _verdict(sweep: SweepRead, limits: Limits, best: Point | None) -> str:
    kept = " and ".join(test.words for test in _tests(sweep, limits))
    if not sweep.finished:
        return "No point has finished yet."
    if best is None:
        return f"No point keeps to {kept}."
    name = sweep.objectives[0]
    words = f"{title_of(name)} {written(name, best.measure(name))} with {label_of(best)}."
    return f"Best with {kept}: {words}" if limits else f"Best: {words}"


def _caveats(sweep: SweepRead) -> list[str]:
    said = []
    if sweep.objectives[0].startswith("test/") and len(sweep.finished) > 1:
        said.append(
            "The best of several test values is too good: who chooses by the test set needs fresh data to judge by. "
            "The objective val chooses by validation data."
        )
    if len(sweep.front) > 1 and len(sweep.objectives) > 1:
        said.append(f"{len(sweep.front)} of {len(sweep.finished)} points are on the front: none beats another in all.")
    return said


def _tiles(sweep: SweepRead, best: Point | None) -> list[tuple[str, str]]:
    if best is None:
        return []
    return [(written(name, best.measure(name)), title_of(name)) for name in sweep.objectives[:4]]


def _warnings(sweep: SweepRead) -> list[str]:
    said = [
        f"{label_of(point)}: failed{f' ({text.plain(point.error, limit=200)})' if point.error else ''}"
        for point in sweep.points
        if point.status == "failed"
    ]
    machines = {str(record["hardware"]) for record in sweep.records.values()}
    if len(machines) > 1 and "latency_ms" in sweep.objectives:
        said.append("The points come from different machines or thread counts: their latencies cannot be compared.")
    return said[:10]


def _in_order(sweep: SweepRead) -> list[Point]:
    """Return all points, the best first, then those without a value."""
    return [*sweep.ranked, *(point for point in sweep.points if point not in sweep.finished)]


def _table(sweep: SweepRead, points: Sequence[Point]) -> Table:
    header = ["point", *(text.plain(key, limit=40) for key in sweep.axes)]
    header += [*(title_of(name) for name in sweep.objectives), "status", "took"]
    rows = [
        [
            f"{point.number}",
            *(text.plain(short(point.values.get(key, text.DASH)), limit=40) for key in sweep.axes),
            *(written(name, point.measure(name)) for name in sweep.objectives),
            point.status,
            text.duration(point.wall_seconds),
        ]
        for point in points[:_MOST_ROWS]
    ]
    return Table(header, rows, strong=1 + len(sweep.axes))


def _how_compared(sweep: SweepRead) -> list[str]:
    ways = [
        f"{title_of(name)}: {'more' if way == 'maximize' else 'less'} is better"
        for name, way in zip(sweep.objectives, sweep.directions, strict=True)
    ]
    return [f"{'; '.join(ways)}."]


def _best(best: Point | None) -> Section:
    if best is None:
        return Section("The best point")
    code = [Code("Train it again", "bash", _command(best))]
    return Section("The best point", remarks=[f"Its run: {text.plain(best.name, limit=160)}"], code=code)


def _front(sweep: SweepRead) -> Section:
    """List the points that no other one beats; with one objective that is the best one."""
    if len(sweep.objectives) < 2 or not sweep.front:
        return Section("What no other point beats")
    return Section("What no other point beats", [_table(sweep, sweep.front[:_MOST_FRONT])])


def _command(point: Point) -> str:
    return text.code(shlex.join(point.command))


def _again(sweep: SweepRead) -> Section:
    lines = [f"# point {point.number}\n{_command(point)}" for point in sweep.points[:_MOST_ROWS]]
    return Section(
        "Run a point again",
        code=[Code("The whole sweep", "bash", text.code(sweep.command)), Code("Each point", "bash", "\n".join(lines))],
    )
