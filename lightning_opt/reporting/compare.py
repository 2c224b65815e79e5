"""Render several runs side by side: one table, one plane of quality against cost, mean and spread over seeds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_opt.errors import ConfigError
from lightning_opt.reporting import style, text
from lightning_opt.reporting.figures import FOLDER, Drawn, Point, draw_plane
from lightning_opt.reporting.groups import Group, group_runs, mean, spread
from lightning_opt.reporting.names import group_words, model_name
from lightning_opt.reporting.page import Page, Section, write_page
from lightning_opt.reporting.ratios import engines, main_metric
from lightning_opt.reporting.tables import Table

Record = Mapping[str, Any]
Reader = Callable[[Record], float | None]


def render_comparison(run_dirs: Sequence[Path | str], out_dir: Path | str) -> tuple[Path, Path]:
    """Write `comparison.html` and `comparison.md` for several runs; runs that differ only by seed become one row.

    Args:
        run_dirs: Run folders.
        out_dir: Where to write; made where it is missing.

    Returns:
        The paths of both files.

    Raises:
        ConfigError: No run folder was given.
        StorageError: A folder has no readable record, or the report could not be written.
    """
    if not run_dirs:
        raise ConfigError("runs is empty; name at least one run folder")
    groups, folder = group_runs(run_dirs), Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    metric = next((name for group in groups for run in group.runs if (name := main_metric(run.record["models"]))), None)
    figures = _figures(groups, folder, metric)
    page = Page(
        title=f"{len(groups)} {'method' if len(groups) == 1 else 'methods'} side by side",
        kicker=f"{sum(len(group.runs) for group in groups)} runs",
        verdict=_verdict(groups, metric),
        caveats=_caveats(groups, metric),
        warnings=_warnings(groups),
        sections=[
            Section("Quality", [_quality_table(groups, metric)], figures),
            Section("Cost", [_cost_table(groups)]),
            Section("Runs", [_runs_table(groups, metric)]),
        ],
    )
    return write_page(page, folder, "comparison")


def _quality(model: str, metric: str | None) -> Reader:
    return lambda record: ((record["models"].get(model) or {}).get("quality") or {}).get(metric)


def _of_comparison(key: str) -> Reader:
    return lambda record: record["comparison"].get(key)


def _measure(model: str, key: str) -> Reader:
    return lambda record: (record["models"].get(model) or {}).get(key)


def _latency(model: str) -> Reader:
    def read(record: Record) -> float | None:
        rows = (record["models"].get(model) or {}).get("latency_ms") or ()
        return next((row["p50"] for row in rows), None)

    return read


def _first_ratio(record: Record) -> float | None:
    return next((row["value"] for row in record["comparison"].get("latency_ratio") or ()), None)


def _best_latency(record: Record) -> float | None:
    """Return the latency of what a run made, in its fastest engine or file, at the smallest batch size."""
    model = record["models"].get("student") or {}
    parts = [*engines(model), *record["deployed"]] if model else []
    rows = [row for part in parts for row in part.get("latency_ms") or () if row["p50"]]
    batch = min((row["batch"] for row in rows), default=None)
    return min((row["p50"] for row in rows if row["batch"] == batch), default=None)


def _over_best(record: Record) -> float | None:
    return next((row["over_best_dense_fp32"] for row in record["comparison"].get("speedup") or ()), None)


def _higher_is_better(groups: Sequence[Group]) -> bool:
    return all(
        run.record["comparison"].get("higher_is_better", True) is not False for group in groups for run in group.runs
    )


def with_spread(values: Sequence[float], write: Callable[[float | None], str]) -> str:
    """Write a mean, with its sample standard deviation where there are several values: `0.968 ± 0.002`."""
    words = write(mean(values))
    return f"{words} ± {write(spread(values))}" if len(values) > 1 else words


def _percent(value: float | None) -> str:
    return text.DASH if value is None else f"{100 * value:.0f} %"


def _signed(value: float | None) -> str:
    return text.DASH if value is None else f"{'+' if value > 0 else '−' if value < 0 else ''}{text.quality(abs(value))}"


def _gain(values: Sequence[float]) -> str:
    words = _signed(mean(values))
    return f"{words} ± {text.quality(spread(values))}" if len(values) > 1 else words


def _quality_table(groups: Sequence[Group], metric: str | None) -> Table:
    name = text.plain(metric or "quality", limit=24)
    words = group_words([run.record for group in groups for run in group.runs])
    header = ["", "seeds", f"{name}: teacher", words.control, words.result, f"over {words.control}", "gap closed"]
    rows = [
        [
            group.label,
            str(len(group.runs)),
            *(with_spread(group.values(_quality(m, metric)), text.quality) for m in ("teacher", "baseline", "student")),
            _gain(group.values(_of_comparison("baseline_gain"))),
            with_spread(group.values(_of_comparison("gap_closure")), _percent),
        ]
        for group in groups
    ]
    return _without_empty(Table(header, rows, strong=4))


def _without_empty(table: Table) -> Table:
    """Leave out columns in which nothing is known, such as the teacher of runs without one."""
    kept = [
        place
        for place in range(len(table.header))
        if place in (0, 1, table.strong) or any(row[place] != text.DASH for row in table.rows)
    ]
    strong = kept.index(table.strong) if table.strong is not None else None
    return Table(
        [table.header[place] for place in kept], [[row[place] for place in kept] for row in table.rows], strong
    )


def _cost_table(groups: Sequence[Group]) -> Table:
    columns: list[tuple[str, Reader, Callable[[float | None], str]]] = [
        ("parameters", _measure("student", "params"), text.count),
        ("not zero", _measure("student", "params_nonzero"), text.count),
        ("size on disk", _measure("student", "size_bytes"), text.size),
        ("latency in torch eager", _latency("student"), text.milliseconds),
        ("in its best engine", _best_latency, text.milliseconds),
        ("smaller", _of_comparison("size_ratio"), text.times),
        ("faster in torch eager", _first_ratio, text.times),
        ("faster than the best dense fp32", _over_best, text.times),
    ]
    rows = [[group.label, *(write(mean(group.values(read))) for _, read, write in columns)] for group in groups]
    words = group_words([run.record for group in groups for run in group.runs])
    return _without_empty(Table([words.result, *(title for title, _, _ in columns)], rows))


def _runs_table(groups: Sequence[Group], metric: str | None) -> Table:
    rows = [
        [
            text.plain(run.folder.as_posix(), limit=80),
            group.label,
            str(run.record["seed"]),
            run.record["status"],
            text.quality(_quality("student", metric)(run.record)),
        ]
        for group in groups
        for run in group.runs
    ]
    words = group_words([run.record for group in groups for run in group.runs])
    return Table(["run", "method", "seed", "status", words.result], rows, prose=True)


def _ranked(groups: Sequence[Group], metric: str | None) -> list[tuple[float, Group]]:
    """Order the groups by the student's mean quality, the best first."""
    found = [(mean(group.values(_quality("student", metric))), group) for group in groups]
    known = [(value, group) for value, group in found if value is not None]
    return sorted(known, key=lambda pair: pair[0], reverse=_higher_is_better(groups))


def _verdict(groups: Sequence[Group], metric: str | None) -> str:
    ranked = _ranked(groups, metric)
    if not ranked:
        names = group_words([run.record for group in groups for run in group.runs])
        return f"No run has a measured quality of its {names.result}."
    value, best = ranked[0]
    words = f"{best.label} is best: {text.plain(metric, limit=30)} {text.quality(value)}"
    words += f" on average over {len(best.runs)} seeds" if len(best.runs) > 1 else ""
    if len(ranked) == 1:
        return f"{words.replace(' is best: ', ' reaches ')}."
    second, rival = ranked[1]
    return f"{words}, against {text.quality(second)} of the next, {rival.label}."


def _caveats(groups: Sequence[Group], metric: str | None) -> list[str]:
    ranked, said = _ranked(groups, metric), []
    if len(ranked) > 1:
        (first, best), (second, rival) = ranked[:2]
        spreads = [spread(group.values(_quality("student", metric))) for group in (best, rival)]
        if all(len(group.runs) > 1 for group in (best, rival)) and abs(first - second) <= max(spreads):
            said.append("The two best differ by less than the spread over their seeds: this is no clear lead.")
    if any(len(group.runs) == 1 for group in groups):
        said.append("Where there is one seed only, small differences can change with the seed.")
    said.append("± is the sample standard deviation over seeds.")
    return said


def _warnings(groups: Sequence[Group]) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    said = [
        f"{text.plain(run.folder.as_posix(), limit=80)}: {run.record['status']}"
        for run in runs
        if run.record["status"] != "finished"
    ]
    machines = {json_key(run.record["hardware"]) for run in runs}
    if len(machines) > 1:
        said.append("The runs come from different machines or thread counts: their latencies cannot be compared.")
    return said


def json_key(hardware: Mapping[str, Any]) -> str:
    """Give equal machines equal text."""
    cpu, gpus = hardware["cpu"], [gpu["name"] for gpu in hardware["gpus"]]
    return f"{cpu['model']}|{cpu['cores']}|{hardware['threads']}|{gpus}"


def _figures(groups: Sequence[Group], folder: Path, metric: str | None) -> list[Drawn]:
    points = [point for group in groups for point in _points(group, metric, one=len(groups) == 1)]
    with style.look():
        figure = draw_plane(points, text.plain(metric or "quality", limit=30), front=_higher_is_better(groups))
        if figure is None:
            return []
        path = style.save(figure, folder / FOLDER / "pareto.png")
    caption = "Line: what no other run beats in both quality and cost. Bars: standard deviation over seeds."
    return [Drawn(path, "Quality against latency and size", caption)]


def _points(group: Group, metric: str | None, *, one: bool) -> list[Point]:
    """Give the student of a group, and its teacher and student alone where only one group is drawn."""
    names = ("teacher", "baseline", "student") if one else ("student",)
    points = []
    for name in names:
        values = group.values(_quality(name, metric))
        quality = mean(values)
        if quality is not None:
            label = group.label if name == "student" else model_name(group.runs[0].record, name)
            latency, size = mean(group.values(_latency(name))), mean(group.values(_measure(name, "size_bytes")))
            role = name if one else group.label
            points.append(Point(label, role, quality, latency, size, spread(values)))
    return points
