"""Draw what quantization did: every engine's latency and size, the bits of each layer, and when they were taken."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_opt.reporting import style, text
from lightning_opt.reporting.curves import Tables, draw_quality_lines, validation_key
from lightning_opt.reporting.gains import batches_of
from lightning_opt.reporting.labels import Mark, label_ends
from lightning_opt.reporting.pruned_figures import mark_shrinks, sparsity_panel
from lightning_opt.reporting.quantized_tables import engine_rows, shown_layers

Record = Mapping[str, Any]
Row = Mapping[str, Any]
_FLOAT, _FEW = style.ROLES["baseline"], style.ROLES["student"]
_SPARSITY, _PARAMS = "student/sparsity", "student/params"


def draw_engines(record: Record) -> Figure | None:
    """Draw latency at each batch size and size of each engine and file: float in one colour, few bits in another."""
    rows = engine_rows(record)
    batches = sorted({batch for row in rows for batch in batches_of(row["part"])})[:3]
    if not rows or not batches:
        return None
    figure = style.canvas(1.0 + 0.27 * len(rows))
    sized = any(row["size_bytes"] for row in rows)
    grid = figure.subplots(1, len(batches) + sized, sharey=True, squeeze=False)[0]
    for axes, batch in zip(grid, batches, strict=False):
        _time_panel(axes, rows, batch)
    if sized:
        _size_panel(grid[-1], rows)
    places = np.arange(len(rows))[::-1]
    grid[0].set_yticks(places, [text.plain(_tick(row), limit=46) for row in rows])
    for tick, row in zip(grid[0].get_yticklabels(), rows, strict=True):
        tick.set_color(_FEW if row["role"] == "quantized" else _FLOAT)
        tick.set_fontweight("bold" if row["chosen"] else "normal")
    return figure


def _tick(row: Row) -> str:
    return f"▸ {row['name']}" if row["chosen"] else str(row["name"])


def _time_panel(axes: Axes, rows: Sequence[Row], batch: int) -> None:
    ends: list[float] = []
    for place, row in enumerate(rows):
        found = next((one for one in row["part"]["latency_ms"] or () if one["batch"] == batch and one["p50"]), None)
        if found is None:
            continue
        height, color = len(rows) - 1 - place, _FEW if row["role"] == "quantized" else _FLOAT
        low, high = found.get("p10") or found["p50"], found["p95"] or found["p50"]
        ends += [low, high]
        axes.plot([low, high], [height, height], color=color, lw=1.2, alpha=0.6)
        axes.scatter(
            found["p50"], height, s=30 if row["chosen"] else 24, color=color, edgecolor="white", lw=0.7, zorder=3
        )
        _beside(axes, high, height, text.number(found["p50"]), strong=row["chosen"])
    axes.set_title(f"batch {batch}, ms")
    axes.set_xscale("log")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=False, axis="y")
    if ends:
        room = (max(ends) / min(ends)) ** 0.08 * 1.1
        axes.set_xlim(min(ends) / room, max(ends) * room**3 * 1.5)
        style.log_ticks(axes.xaxis)


def _beside(axes: Axes, at: float, height: float, words: str, *, strong: bool) -> None:
    axes.annotate(
        words,
        (at, height),
        xytext=(4, -0.5),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        fontweight="bold" if strong else "normal",
        color=style.INK if strong else style.MUTED,
    )


def _size_panel(axes: Axes, rows: Sequence[Row]) -> None:
    largest = max(row["size_bytes"] or 0 for row in rows)
    unit, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes")) if largest >= pair[0])
    for place, row in enumerate(rows):
        if row["size_bytes"]:
            height, color = len(rows) - 1 - place, _FEW if row["role"] == "quantized" else _FLOAT
            axes.barh(height, row["size_bytes"] / unit, height=0.5, color=color, alpha=0.85)
            _beside(axes, row["size_bytes"] / unit, height, text.number(row["size_bytes"] / unit), strong=row["chosen"])
    axes.set_title(f"size, {name}")
    axes.set_xlim(0, 1.3 * largest / unit)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=4)


def draw_bits(record: Record) -> Figure | None:
    """Draw the bits of each weight and, where it is known, what each layer costs alone; None where all are alike."""
    shown, _ = shown_layers(record)
    costs = [row["sensitivity"] for row in shown]
    ranked = any(cost is not None for cost in costs)
    if ranked:
        shown = sorted(shown, key=lambda row: -(row["sensitivity"] if row["sensitivity"] is not None else -np.inf))
    if not shown or (not ranked and len({row["weight_bits"] for row in shown}) == 1):
        return None
    figure = style.canvas(0.85 + 0.19 * len(shown))
    grid = figure.subplots(1, 1 + ranked, sharey=True, squeeze=False)[0]
    if ranked:
        _cost_panel(grid[0], shown)
    _bits_panel(grid[-1], shown)
    places = np.arange(len(shown))[::-1]
    grid[0].set_yticks(places, [text.plain(row["name"], limit=40) for row in shown], fontsize=7.5)
    grid[0].tick_params(axis="y", labelcolor=style.INK)
    grid[0].set_ylim(-0.6, len(shown) - 0.4)
    return figure


def _cost_panel(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        if row["sensitivity"] is not None:
            height = len(rows) - 1 - place
            axes.barh(height, row["sensitivity"], height=0.6, color=_of_bits(row["weight_bits"]))
    axes.set_title("what each layer costs alone")
    axes.axvline(0, color=style.INK, lw=0.6)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=4)


def _bits_panel(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        height, bits = len(rows) - 1 - place, row["weight_bits"]
        axes.barh(height, 32 if bits is None else bits, height=0.6, color=_of_bits(bits))
        reads = "" if row["activation_bits"] is None else f", reads {row['activation_bits']:g}"
        words = "float" if bits is None else f"{bits:g}{reads}"
        inside = bits is None
        axes.annotate(
            words,
            (32 if inside else bits, height),
            xytext=(-4 if inside else 4, -0.5),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7,
            color=style.PAPER if inside else style.INK,
        )
    axes.set_title("bits of its weight")
    axes.set_xlim(0, 34)
    axes.set_xticks([0, 2, 4, 8, 16, 32])
    axes.grid(visible=False, axis="y")


def _of_bits(bits: float | None) -> str:
    """Give float the control's colour, and fewer bits a paler one."""
    if bits is None:
        return _FLOAT
    return _FEW if bits >= 8 else "#56b4e9" if bits >= 4 else "#9ec9e6"


def draw_steps(record: Record, tables: Tables) -> Figure | None:
    """Draw validation quality, sparsity where the run pruned, and bits over the same steps; None if nothing changed."""
    stage = next((stage for stage in record["stages"] if "quant" in str(stage["method"]).lower()), None)
    bits, student = record["quantization"]["totals"]["weight_bits"], tables.get("student", {})
    if stage is None or stage["from_step"] is None or bits is None or not student:
        return None
    last = max((int(series.step[-1]) for series in student.values() if len(series)), default=1)
    key, sparsity = validation_key(record["comparison"].get("metric"), tables), student.get(_SPARSITY)
    if sparsity is not None and not len(sparsity):
        sparsity = None
    heights = [1.9] * bool(key) + [0.9] * (sparsity is not None) + [0.8]
    figure = style.canvas(0.9 + 1.25 * sum(heights), right=0.26)
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    marks: list[list[Mark]] = [draw_quality_lines(panels[0], record, tables, key)] if key else []
    if sparsity is not None:
        marks.append([sparsity_panel(panels[len(marks)], sparsity, last)])
    marks.append([_bits_over_steps(panels[-1], stage, bits, last)])
    before = float((record.get("pruning") or {}).get("totals", {}).get("params_before") or 0)
    for panel in panels:
        panel.axvline(stage["from_step"], color=style.INK, lw=0.7, ls=(0, (2, 2)), zorder=1)
        if before:
            mark_shrinks(panel, student.get(_PARAMS), before, named=panel is panels[0])
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(0, max(last, 1))
    panels[-1].xaxis.set_major_formatter(lambda value, _: style.plain_number(value))
    for panel, ends in zip(panels, marks, strict=True):
        label_ends(panel, ends)
    return figure


def _bits_over_steps(axes: Axes, stage: Row, bits: float, last: int) -> Mark:
    """Draw the mean bits of a parameter: those of float until quantizers are switched on."""
    steps, values = [0, stage["from_step"], max(last, stage["from_step"])], [32.0, float(bits), float(bits)]
    axes.plot(steps, values, color=_FEW, lw=1.5, drawstyle="steps-post")
    axes.fill_between(steps, values, step="post", color=_FEW, alpha=0.12, lw=0)
    axes.set_title("bits of a parameter, on average")
    axes.set_ylim(0, 36)
    axes.set_yticks([0, 8, 16, 32])
    return Mark(float(steps[-1]), values[-1], f"{bits:.1f} bits", _FEW)
