"""Draw what pruning did: quality and sparsity over the steps, and what is left of each layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_opt.reporting import style, text
from lightning_opt.reporting.curves import Tables, draw_quality_lines, validation_key
from lightning_opt.reporting.labels import Mark, label_ends
from lightning_opt.reporting.metrics import Series
from lightning_opt.reporting.pruned_tables import shown_layers

Record = Mapping[str, Any]
_LEFT, _ZERO, _GONE = style.ROLES["student"], "#9ec9e6", "#e7e9ee"
_SPARSITY, _PARAMS = "student/sparsity", "student/params"


def draw_steps(record: Record, tables: Tables) -> Figure | None:
    """Draw validation quality above and sparsity below over the same steps; None if no sparsity was logged."""
    sparsity = tables.get("student", {}).get(_SPARSITY)
    if sparsity is None or not len(sparsity):
        return None
    key = validation_key(record["comparison"].get("metric"), tables)
    figure = style.canvas(4.3 if key else 2.0, right=0.2)
    grid = figure.subplots(2 if key else 1, 1, sharex=True, squeeze=False, height_ratios=[1.9, 1.0] if key else [1.0])
    panels = list(grid[:, 0])
    last = _last_step(tables)
    marks = [draw_quality_lines(panels[0], record, tables, key)] if key else []
    marks.append([sparsity_panel(panels[-1], sparsity, last)])
    before = float(record["pruning"]["totals"]["params_before"])
    for panel in panels:
        mark_shrinks(panel, tables["student"].get(_PARAMS), before, named=panel is panels[0])
    panels[-1].set_xlabel("step")
    panels[-1].set_xlim(0, max(last, 1))
    panels[-1].xaxis.set_major_formatter(lambda value, _: style.plain_number(value))
    for panel, ends in zip(panels, marks, strict=True):
        label_ends(panel, ends)
    return figure


def _last_step(tables: Tables) -> int:
    return max((int(series.step[-1]) for series in tables["student"].values() if len(series)), default=1)


def sparsity_panel(axes: Axes, sparsity: Series, last: int) -> Mark:
    """Draw the share of zeros as steps, from nothing at the start to its last value at the end of the run."""
    steps = np.concatenate([[0], sparsity.step, [max(last, int(sparsity.step[-1]))]])
    first = 0.0 if sparsity.step[0] > 0 else float(sparsity.value[0])
    values = 100 * np.concatenate([[first], sparsity.value, sparsity.value[-1:]])
    axes.plot(steps, values, color=_LEFT, lw=1.5, drawstyle="steps-post")
    axes.fill_between(steps, values, step="post", color=_LEFT, alpha=0.12, lw=0)
    axes.set_title("share of the original weights pruned, %")
    axes.set_ylim(0, 105 if np.nanmax(values) > 60 else max(1.3 * float(np.nanmax(values)), 1.0))
    return Mark(float(steps[-1]), float(values[-1]), f"{values[-1]:.1f} %", _LEFT)


def mark_shrinks(axes: Axes, params: Series | None, before: float, *, named: bool) -> None:
    """Draw a line where the model became physically smaller, with the parameters that it then had."""
    if params is None:
        return
    smaller = np.flatnonzero(np.diff(params.value, prepend=before) < 0)
    for place in smaller[:4]:
        axes.axvline(float(params.step[place]), color=style.INK, lw=0.8, ls=(0, (2, 2)), zorder=1)
        if named:
            axes.annotate(
                f"{text.count(float(params.value[place]))} parameters",
                (float(params.step[place]), 0.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=style.INK,
            )


def draw_layers(record: Record) -> Figure | None:
    """Draw a bar for each layer: what is left of its original weights, what is zero, and what was removed."""
    shown, _ = shown_layers(record)
    if not shown:
        return None
    figure = style.canvas(0.8 + 0.19 * len(shown))
    axes = figure.subplots()
    rows = np.arange(len(shown))[::-1]
    before = np.array([max(row["params_before"], 1) for row in shown], dtype=np.float64)
    left = 100 * np.array([row["nonzero"] for row in shown]) / before
    there = 100 * np.array([row["params"] for row in shown]) / before
    axes.barh(rows, 100, height=0.68, color=_GONE, label="removed")
    axes.barh(rows, there, height=0.68, color=_ZERO, label="zero")
    axes.barh(rows, left, height=0.68, color=_LEFT, label="left")
    for height, share in zip(rows, left, strict=True):
        inside = share > 88
        axes.annotate(
            f"{share:.0f} %" if share >= 10 else f"{share:.1f} %",
            (share, height),
            xytext=(-4 if inside else 4, -0.5),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7,
            color=style.PAPER if inside else style.INK,
        )
    axes.set_yticks(rows, [text.plain(row["name"].removesuffix(".weight"), limit=40) for row in shown], fontsize=7.5)
    axes.tick_params(axis="y", labelcolor=style.INK)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("% of the layer's original weights")
    axes.grid(visible=False, axis="y")
    _key(figure, axes, removed=bool((there < 99.95).any()), zeros=bool((there - left > 0.05).any()))
    return figure


def _key(figure: Figure, axes: Axes, *, removed: bool, zeros: bool) -> None:
    handles, names = axes.get_legend_handles_labels()
    wanted: Sequence[str] = ["left", *(["zero"] if zeros else []), *(["removed"] if removed else [])]
    chosen = [handles[names.index(name)] for name in wanted]
    figure.legend(chosen, wanted, loc="outside upper left", ncols=3, frameon=False, fontsize=8.5, handlelength=1.0)
