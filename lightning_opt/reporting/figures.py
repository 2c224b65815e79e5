"""Draw the figures of one run into its folder, and the plane of quality against cost for several."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_opt.reporting import style, text
from lightning_opt.reporting.curves import Tables, draw_losses, draw_quality
from lightning_opt.reporting.gain_figures import draw_gains
from lightning_opt.reporting.labels import Mark, label_points
from lightning_opt.reporting.names import before_name, model_name
from lightning_opt.reporting.pruned_figures import draw_layers, draw_steps
from lightning_opt.reporting.quantized_figures import draw_bits, draw_engines
from lightning_opt.reporting.quantized_figures import draw_steps as draw_bits_over_steps
from lightning_opt.reporting.ratios import engine_label, engines
from lightning_opt.reporting.tables import model_order

Record = Mapping[str, Any]
FOLDER = "figures"
Plan = tuple[str, str, str, Callable[[], Figure | None]]


@dataclass(frozen=True)
class Drawn:
    """A figure on disk.

    Attributes:
        path: The PNG.
        title: Two or three words.
        caption: What it shows and how to read it.
    """

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Point:
    """One model in the plane of quality against cost.

    Attributes:
        label: Its name in the figure.
        role: "teacher", "baseline", "student", "deployed" or any other name, which gives the colour.
        quality: Value of the main metric.
        latency_ms: Median at the smallest batch, or None.
        size_bytes: On disk, or None.
        spread: Half the height of an error bar over seeds.
    """

    label: str
    role: str
    quality: float
    latency_ms: float | None
    size_bytes: float | None
    spread: float = 0.0


def draw_all(run_dir: Path, record: Record, tables: Tables) -> list[Drawn]:
    """Draw every figure for which the run has numbers into `figures/`.

    Returns:
        The figures in the order in which one reads them.
    """
    metric = text.plain(record["comparison"].get("metric") or "quality", limit=30)
    plans: list[Plan] = [
        (
            "quality_and_cost",
            "Quality against latency and size",
            f"Up is better {metric}, left is faster or smaller; both cost axes are logarithmic."
            if record["comparison"].get("higher_is_better", True)
            else f"Down is better {metric}, left is faster or smaller; both cost axes are logarithmic.",
            lambda: draw_plane(points_of(record), metric, batch=_smallest_batch(record)),
        ),
        ("gains", *_gains_words(record), lambda: draw_gains(record)),
        *_quality_plans(record, tables),
        (
            "losses",
            "Loss terms",
            "Pale: as logged; strong: averaged over a twenty-fifth of the run. Each panel has its own scale.",
            lambda: draw_losses(record, tables),
        ),
        *_latency_plans(record),
    ]
    drawn = []
    for name, title, caption, draw in plans:
        with style.look():
            figure = draw()
            if figure is not None:
                drawn.append(Drawn(style.save(figure, run_dir / FOLDER / f"{name}.png"), title, caption))
    return drawn


def _gains_words(record: Record) -> tuple[str, str]:
    if "teacher" not in record["models"] and (record.get("pruning") or record.get("quantization")):
        return (
            f"{before_name(record).capitalize()} divided by {model_name(record, 'student')}",
            "How many times smaller or faster it became; left of 1× it is larger or slower.",
        )
    return (
        "Teacher divided by student",
        "How many times smaller or faster the student is than its teacher; left of 1× it is larger or slower.",
    )


def _quality_plans(record: Record, tables: Tables) -> list[Plan]:
    """Plan what is drawn over the steps: with sparsity below it where the run pruned, and then each layer too."""
    quality = "While training; the student alone is the control with the same budget."
    if record.get("quantization"):
        return _quantized_plans(record, tables)
    if not record.get("pruning"):
        return [("quality", "Validation quality", quality, lambda: draw_quality(record, tables))]
    over_steps: Plan = (
        "pruning",
        "Quality and sparsity over the steps",
        "Above: validation while training; the dense model is the control with the same budget. Below: what was "
        "pruned. Dashed: here the model became physically smaller.",
        lambda: draw_steps(record, tables) or draw_quality(record, tables),
    )
    words = "Dark: left of the original weights; pale: zeros that are still stored and multiplied; grey: removed."
    return [over_steps, ("layers", "What is left of each layer", words, lambda: draw_layers(record))]


def _quantized_plans(record: Record, tables: Tables) -> list[Plan]:
    """Plan what is drawn over the steps, and the bits of each layer."""
    over_steps: Plan = (
        "quantization",
        "Quality and bits over the steps",
        "Above: validation while training. Below: the mean bits of a parameter. Dashed: from here on it is rounded.",
        lambda: draw_bits_over_steps(record, tables) or draw_quality(record, tables),
    )
    bits: Plan = (
        "bits",
        "Bits of each layer",
        "Orange: float. Where each layer was tried alone, the one that costs most is at the top.",
        lambda: draw_bits(record),
    )
    left = "Dark: left of the original weights; pale: zeros; grey: removed."
    pruned: list[Plan] = [("layers", "What is left of each layer", left, lambda: draw_layers(record))]
    return [over_steps, bits, *(pruned if record.get("pruning") else [])]


def _latency_plans(record: Record) -> list[Plan]:
    words = "Dot: median; line: to the 95th percentile where it was measured. Logarithmic."
    plans: list[Plan] = [("latency", "Latency by engine", words, lambda: draw_latency(record))]
    if not record.get("quantization"):
        return plans
    if len(record["models"]) == 2:  # the other figure shows all that this one does
        plans = []
    words = (
        "Dot: median; line: 10th to 95th percentile; all took turns. Orange: float; blue: few bits; bold: recommended."
    )
    return [("engines", "Latency and size in each engine", words, lambda: draw_engines(record)), *plans]


def _smallest_batch(record: Record) -> int:
    rows = [row["batch"] for model in record["models"].values() for row in model["latency_ms"] or ()]
    return min(rows, default=1)


def points_of(record: Record) -> list[Point]:
    """List the models and deployed formats of a record whose main quality was measured."""
    metric, batch = record["comparison"].get("metric"), _smallest_batch(record)
    named = [(model_name(record, name), name, record["models"][name]) for name in model_order(record)]
    named += [(text.plain(entry["format"], limit=24), "deployed", entry) for entry in record["deployed"]]
    points = []
    for label, role, entry in named:
        quality = (entry["quality"] or {}).get(metric)
        if quality is not None:
            latency = next((row["p50"] for row in entry["latency_ms"] or () if row["batch"] == batch), None)
            points.append(Point(text.plain(label, limit=26), role, quality, latency, entry["size_bytes"]))
    return points


def draw_plane(points: Sequence[Point], metric: str, *, batch: int = 1, front: bool | None = None) -> Figure | None:
    """Draw quality against latency and against size, one panel for each that was measured; None if neither was.

    Args:
        points: At most a few dozen.
        metric: Name of the main metric.
        batch: At which the latency was taken.
        front: Draw the line of what nothing beats in both; True if higher quality is better, False if lower is.
    """
    panels: list[tuple[str, Callable[[Point], float | None], Callable[[float], float]]] = [
        (f"latency at batch {batch}, ms", lambda point: point.latency_ms, float),
        ("size on disk, MB", lambda point: point.size_bytes, lambda size: size / 1e6),
    ]
    panels = [panel for panel in panels if any(panel[1](point) for point in points)]
    if not panels:
        return None
    figure = style.canvas(3.3)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    points = [replace(point, label=text.plain(point.label, limit=26 if len(points) <= 6 else 19)) for point in points]
    marks = [_scatter(axes, points, *panel) for axes, panel in zip(grid, panels, strict=True)]
    for axes, placed in zip(grid, marks, strict=True):
        if front is not None:
            _front(axes, placed, higher_is_better=front)
    grid[0].set_ylabel(metric)
    for axes, placed in zip(grid, marks, strict=True):
        label_points(axes, placed, size=7.5)
    return figure


def _scatter(
    axes: Axes,
    points: Sequence[Point],
    title: str,
    read: Callable[[Point], float | None],
    scale: Callable[[float], float],
) -> list[Mark]:
    marks = []
    for position, point in enumerate(points):
        cost = read(point)
        if not cost:
            continue
        color, at = style.color(point.role, position), scale(cost)
        if point.spread:
            axes.errorbar(at, point.quality, yerr=point.spread, color=color, lw=1.0, capsize=2.5, zorder=2)
        _marker(axes, at, point, color)
        marks.append(Mark(at, point.quality, point.label, color))
    _gain_arrow(axes, points, read, scale)
    axes.set_xlabel(title)
    axes.set_xscale("log")
    costs, heights = [mark.x for mark in marks], [mark.y for mark in marks]
    if costs:
        room = max((max(costs) / min(costs)) ** 0.22, 1.35)
        axes.set_xlim(min(costs) / room, max(costs) * room * 1.25)
        high = max(max(heights) - min(heights), 1e-6 + 0.002 * abs(max(heights)))
        low, top = axes.get_ylim()
        axes.set_ylim(min(low, min(heights) - 0.18 * high), max(top, max(heights) + 0.18 * high))
        style.log_ticks(axes.xaxis)
    return marks


def undominated(marks: Sequence[Mark], *, higher_is_better: bool) -> list[Mark]:
    """List the marks that no other beats in both x (lower is better) and y, from left to right."""
    sign = 1.0 if higher_is_better else -1.0
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, -sign * mark.y)):
        if not found or sign * mark.y > sign * found[-1].y:
            found.append(mark)
    return found


def _front(axes: Axes, marks: Sequence[Mark], *, higher_is_better: bool) -> None:
    line = undominated(marks, higher_is_better=higher_is_better)
    across, up = [mark.x for mark in line], [mark.y for mark in line]
    axes.plot(across, up, color=style.MUTED, lw=0.9, ls=(0, (4, 3)), drawstyle="steps-post", zorder=1)


def _marker(axes: Axes, at: float, point: Point, color: str) -> None:
    shape = style.MARKERS.get(point.role, "o")
    if point.role == "deployed":  # a ring: it often lies where the student lies
        axes.scatter(at, point.quality, s=60, marker=shape, facecolor="none", edgecolor=color, linewidth=1.2, zorder=3)
    else:
        axes.scatter(at, point.quality, s=34, marker=shape, color=color, edgecolor="white", linewidth=0.8, zorder=4)


def _gain_arrow(
    axes: Axes, points: Sequence[Point], read: Callable[[Point], float | None], scale: Callable[[float], float]
) -> None:
    """Draw a thin arrow from the student alone to the student, where there is one of each."""
    ends = [[point for point in points if point.role == role and read(point)] for role in ("baseline", "student")]
    if [len(found) for found in ends] != [1, 1]:
        return
    start, end = ((scale(read(found[0]) or 1.0), found[0].quality) for found in ends)
    look = {"arrowstyle": "->", "color": style.ROLES["student"], "lw": 0.8, "shrinkA": 5, "shrinkB": 5, "alpha": 0.6}
    axes.annotate("", xy=end, xytext=start, arrowprops=look)


def _latency_rows(record: Record) -> list[tuple[str, str, Sequence[Mapping[str, Any]]]]:
    """List (name, role, latencies by batch) of every model in every engine, and of the deployed files."""
    rows = [
        (f"{model_name(record, name)} · {engine_label(engine)}", name, engine["latency_ms"])
        for name in model_order(record)
        for engine in engines(record["models"][name])
        if engine.get("latency_ms")
    ]
    rows += [
        (f"{entry['format']} · {text.runtime_name(entry['runtime'])}", "deployed", entry["latency_ms"])
        for entry in record["deployed"]
        if entry["latency_ms"]
    ]
    return rows


def draw_latency(record: Record) -> Figure | None:
    """Draw the latency of every model in every engine, one panel a batch size."""
    rows = _latency_rows(record)
    batches = sorted({row["batch"] for _, _, latencies in rows for row in latencies})[:3]
    if not rows or not batches:
        return None
    figure = style.canvas(0.95 + 0.27 * len(rows))
    grid = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(grid, batches, strict=True):
        _latency_panel(axes, rows, batch)
    places = np.arange(len(rows))[::-1]
    grid[0].set_yticks(places, [text.plain(name, limit=44) for name, _, _ in rows])
    for tick, (place, (_, role, _)) in zip(grid[0].get_yticklabels(), enumerate(rows), strict=True):
        tick.set_color(style.color(role, place))
    return figure


def _latency_panel(axes: Axes, rows: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]], batch: int) -> None:
    medians = []
    for place, (_, role, latencies) in enumerate(rows):
        row = next((row for row in latencies if row["batch"] == batch and row["p50"]), None)
        if row is None:
            continue
        height, color = len(rows) - 1 - place, style.color(role, place)
        medians.append(row["p50"])
        axes.plot([row["p50"], row["p95"] or row["p50"]], [height, height], color=color, lw=1.2, alpha=0.6)
        axes.scatter(row["p50"], height, s=26, color=color, edgecolor="white", linewidth=0.7, zorder=3)
        axes.annotate(
            text.number(row["p50"]),
            (row["p95"] or row["p50"], height),
            xytext=(5, -0.5),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=style.MUTED,
        )
    axes.set_title(f"batch {batch}, ms")
    axes.set_xscale("log")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=False, axis="y")
    if medians:
        room = (max(medians) / min(medians)) ** 0.1 * 1.15
        axes.set_xlim(min(medians) / room, max(medians) * room**2 * 1.25)
        style.log_ticks(axes.xaxis)
