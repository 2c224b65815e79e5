"""Draw what was logged over time: every loss term, and validation quality."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_opt.reporting import style, text
from lightning_opt.reporting.labels import Mark, label_ends
from lightning_opt.reporting.metrics import Series
from lightning_opt.reporting.names import model_name

Tables = Mapping[str, Mapping[str, Series]]
_COLUMNS = 3
_MOST_PANELS = 24
_ORDER = ("student", "baseline", "teacher")


def loss_terms(tables: Tables) -> list[str]:
    """List every training loss that was logged, the total first; a term logged per step and per epoch counts once."""
    names = dict.fromkeys(name for model in _models(tables) for name in tables[model] if _is_training_loss(name))
    kept = [name for name in names if not (name.endswith("_epoch") and f"{name.removesuffix('_epoch')}_step" in names)]
    return sorted(kept, key=lambda name: (short_name(name) != "loss", len(short_name(name)), name))


def _is_training_loss(name: str) -> bool:
    return name.startswith("train") and "loss" in name.lower()


def short_name(metric: str) -> str:
    """Drop the stage and the `_step` or `_epoch` of a logged name: `train/loss_kd_step` is `loss_kd`."""
    name = metric.split("/", 1)[-1]
    return name.removesuffix("_step").removesuffix("_epoch")


def _models(tables: Tables) -> list[str]:
    return [name for name in _ORDER if name in tables] + [name for name in tables if name not in _ORDER]


def smooth(values: NDArray[np.float64], points: int) -> NDArray[np.float64]:
    """Average over a centred window of up to `points`, shorter at both ends; leave out what is not finite."""
    finite = np.isfinite(values)
    kernel = np.ones(max(1, points))
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")
    count = np.convolve(finite.astype(np.float64), kernel, mode="full")
    start = (len(kernel) - 1) // 2
    middle = slice(start, start + len(values))
    return np.divide(total[middle], count[middle], out=np.full(len(values), np.nan), where=count[middle] > 0)


def draw_losses(record: Mapping[str, Any], tables: Tables) -> Figure | None:
    """Draw one small panel a loss term, the models that have it in their colours; None if no loss was logged."""
    terms = loss_terms(tables)[:_MOST_PANELS]
    if not terms:
        return None
    columns = min(_COLUMNS, len(terms))
    rows = -(-len(terms) // columns)
    figure = style.canvas(0.55 + (1.75 if rows > 1 else 2.3) * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, term in zip(panels, terms, strict=False):
        _loss_panel(panel, term, tables)
    for panel in panels[len(terms) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(terms) - columns) : len(terms)]:
        panel.set_xlabel("step")
    drawn = [name for name in _models(tables) if any(term in tables[name] for term in terms)]
    _model_key(figure, record, drawn)
    return figure


def _loss_panel(axes: Axes, term: str, tables: Tables) -> None:
    axes.set_title(text.plain(short_name(term), limit=25))
    lowest, highest = [], []
    for position, name in enumerate(_models(tables)):
        series = tables[name].get(term)
        if series is None:
            continue
        line = smooth(series.value, max(1, len(series) // 25))
        color = style.color(name, position)
        axes.plot(series.step, series.value, color=color, lw=0.5, alpha=0.28)
        axes.plot(series.step, line, color=color, lw=1.4, marker="o" if len(series) < 3 else "", ms=3)
        finite = line[np.isfinite(line)]
        lowest.append(finite.min(initial=np.inf))
        highest.append(finite.max(initial=-np.inf))
    low, high = min(lowest, default=np.inf), max(highest, default=-np.inf)
    if not np.isfinite([low, high]).all():
        style.note(axes, "no finite value")
    elif low > 0 and high / low > 20:
        axes.set_yscale("log")
        style.log_ticks(axes.yaxis)
    elif high > low:
        margin = 0.08 * (high - low)
        axes.set_ylim(low - margin if low < 0 else max(0.0, low - margin), high + margin)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: style.plain_number(value))


def _model_key(figure: Figure, record: Mapping[str, Any], names: Sequence[str]) -> None:
    """Name the colours once, above all panels, in words of those colours."""
    if len(names) < 2:
        return
    lines = [figure.add_artist(_stroke(style.color(name, place))) for place, name in enumerate(names)]
    legend = figure.legend(
        lines,
        [model_name(record, name) for name in names],
        loc="outside upper left",
        ncols=4,
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.6,
        labelcolor="linecolor",
        borderaxespad=0.2,
    )
    for line in lines:
        line.remove()
    legend.set_in_layout(True)


def _stroke(color: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, lw=2)


def validation_key(metric: str | None, tables: Tables) -> str | None:
    """Find the logged validation values of a metric, or of the first validation metric that is not a loss."""
    names = list(dict.fromkeys(name for model in _models(tables) for name in tables[model] if name.startswith("val")))
    wanted = (metric or "").split("/")[-1]
    exact = [name for name in names if short_name(name) == wanted or name == f"val_{wanted}"]
    others = [name for name in names if "loss" not in name]
    return next(iter(exact + others + names), None)


def draw_quality(record: Mapping[str, Any], tables: Tables) -> Figure | None:
    """Draw validation quality of student and student alone, and the teacher's final quality as a level."""
    metric = record["comparison"].get("metric")
    key = validation_key(metric, tables)
    names = [name for name in _models(tables) if key in tables[name] and name != "teacher"]
    if key is None or not names:
        return None
    figure = style.canvas(3.1, right=0.2)
    axes = figure.subplots()
    marks = draw_quality_lines(axes, record, tables, key)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: style.plain_number(value))
    label_ends(axes, marks)
    return figure


def draw_quality_lines(axes: Axes, record: Mapping[str, Any], tables: Tables, key: str) -> list[Mark]:
    """Draw one validation metric of every model but the teacher, who is a level; return the marks of the line ends."""
    names = [name for name in _models(tables) if key in tables[name] and name != "teacher"]
    marks = []
    for position, name in enumerate(names):
        series, color = tables[name][key], style.color(name, position)
        few = len(series) <= 30
        axes.plot(
            series.step, series.value, color=color, lw=1.7, marker="o" if few else "", ms=3.2, mec="white", mew=0.6
        )
        marks.append(Mark(float(series.step[-1]), float(series.value[-1]), _end_label(record, name, series), color))
    level = _teacher_level(record, tables, key)
    if level is not None and marks:
        axes.axhline(level, color=style.ROLES["teacher"], lw=1.0, ls=(0, (4, 3)))
        marks.append(Mark(marks[0].x, level, f"teacher {text.quality(level)}", style.ROLES["teacher"]))
    if marks:
        _focus(axes, [tables[name][key] for name in names], level)
    axes.set_title(f"validation {text.plain(short_name(key), limit=50)}")
    return [mark for mark in marks if np.isfinite(mark.y)]


def _end_label(record: Mapping[str, Any], name: str, series: Series) -> str:
    return f"{text.plain(model_name(record, name), limit=18)} {text.quality(float(series.value[-1]))}"


def _teacher_level(record: Mapping[str, Any], tables: Tables, key: str) -> float | None:
    """Return the teacher's last validation value or, where it was not trained in this run, its measured quality."""
    series = tables.get("teacher", {}).get(key)
    if series is not None and np.isfinite(series.value[-1]):
        return float(series.value[-1])
    quality = record["models"].get("teacher", {}).get("quality") or {}
    level = quality.get(record["comparison"].get("metric"))
    return float(level) if level is not None else None


def _focus(axes: Axes, lines: Sequence[Series], level: float | None) -> None:
    """Show the range after the first tenth of the steps: an untrained model's value would flatten all that follows."""
    last = max(int(series.step[-1]) for series in lines)
    late = np.concatenate([series.value[series.step >= 0.1 * last] for series in lines])
    values = np.append(late, [] if level is None else [level])
    values = values[np.isfinite(values)]
    if len(values) and values.max() > values.min():
        margin = 0.08 * (values.max() - values.min())
        axes.set_ylim(values.min() - margin, values.max() + margin)
