"""Draw a sweep: values and objectives side by side, what no point beats, and how the best value came."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_opt.reporting import style, text
from lightning_opt.reporting.figures import FOLDER, Drawn
from lightning_opt.reporting.sweeps import Point, SweepRead
from lightning_opt.reporting.sweeps_words import short, title_of, written

_GOOD_TO_BAD = LinearSegmentedColormap.from_list("rank", ["#005b8f", "#56b4e9", "#d9b35c", "#d55e00"])
_PALE = "#c3c8d1"
_MOST_AXES = 10
_MOST_TICKS = 8
_MANY_TIMES = 30.0  # a span above which an axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One upright axis: where a value stands between 0 and 1, and what is written beside it.

    Attributes:
        title: Its name.
        place: Value to height; None for a point that has none.
        ticks: Height and words.
    """

    title: str
    place: Callable[[Point], float | None]
    ticks: Sequence[tuple[float, str]]


def draw_sweep(folder: Path, sweep: SweepRead) -> list[Drawn]:
    """Draw every figure for which a sweep has numbers into `figures/`."""
    plans: list[tuple[str, str, str, Callable[[], Figure | None]]] = [
        (
            "front",
            "Quality against cost",
            "Ringed: no other point beats it in every objective; the number is the point's. Better is up and left.",
            lambda: draw_front(sweep),
        ),
        (
            "parallel",
            "Values and objectives",
            "One line a point, dark blue the best by the first objective, orange the worst; better is up on the "
            "objectives. Pale: pruned, failed or not done.",
            lambda: draw_parallel(sweep),
        ),
        (
            "history",
            "How the best value came",
            "Dots: points in the order in which they were chosen; line: the best so far; crosses: pruned or failed.",
            lambda: draw_history(sweep) if sweep.method != "grid" else None,
        ),
    ]
    drawn = []
    for name, title, caption, draw in plans:
        with style.look():
            figure = draw()
            if figure is not None:
                drawn.append(Drawn(style.save(figure, folder / FOLDER / f"{name}.png"), title, caption))
    return drawn


def draw_parallel(sweep: SweepRead) -> Figure | None:
    """Draw one upright axis for each key and objective, and one line for each point; None where nothing finished."""
    scales = _scales(sweep) if sweep.finished else []
    if len(scales) < 2:
        return None
    figure = style.canvas(3.7)
    axes = figure.subplots()
    axes.set_axis_off()
    ranked = sweep.ranked
    for point in sweep.points:
        if point not in ranked:
            _line(axes, scales, point, _PALE, width=0.8, order=1)
    for place, point in reversed(list(enumerate(ranked))):
        share = place / max(1, len(ranked) - 1)
        _line(axes, scales, point, _GOOD_TO_BAD(share), width=2.0 if place == 0 else 1.1, order=3 if place == 0 else 2)
    for place, scale in enumerate(scales):
        _upright(axes, place, scale, last=place == len(scales) - 1)
    axes.set_xlim(-0.12, len(scales) - 0.55)
    axes.set_ylim(-0.06, 1.14)
    return figure


def _line(axes: Axes, scales: Sequence[Scale], point: Point, color: object, *, width: float, order: int) -> None:
    """Draw a point as smooth pieces between the axes, so that lines that meet on one can be told apart."""
    heights = [scale.place(point) for scale in scales]
    for place, (left, right) in enumerate(pairwise(heights)):
        if left is None or right is None:
            continue
        steps = [step / 24 for step in range(25)]
        bend = [left + (right - left) * (3 * t * t - 2 * t**3) for t in steps]
        axes.plot([place + t for t in steps], bend, color=color, lw=width, alpha=0.9, zorder=order)


def _upright(axes: Axes, place: int, scale: Scale, *, last: bool) -> None:
    axes.plot([place, place], [0, 1], color=style.INK, lw=0.8, zorder=4)
    axes.text(place, 1.06, scale.title, ha="center", va="bottom", fontsize=8, color=style.INK, fontweight="bold")
    for height, words in scale.ticks:
        axes.plot([place - 0.015, place + 0.015], [height, height], color=style.INK, lw=0.8, zorder=4)
        axes.text(
            place + 0.03,
            height,
            words,
            ha="left",
            va="center",
            fontsize=7,
            color=style.MUTED,
            zorder=5,
            bbox={"boxstyle": "round,pad=0.1", "fc": style.PAPER, "ec": "none", "alpha": 0.75},
        )


def _scales(sweep: SweepRead) -> list[Scale]:
    keys = list(sweep.axes)[: _MOST_AXES - len(sweep.objectives)]
    scales = [scale for key in keys if (scale := _of_values(sweep, key)) is not None]
    pairs = zip(sweep.objectives, sweep.directions, strict=True)
    return [*scales, *(_of_objective(sweep, name, up=way == "maximize") for name, way in pairs)]


def _of_values(sweep: SweepRead, key: str) -> Scale | None:
    """Make the axis of a swept key: numbers to scale, words evenly; None where all points have one value."""
    words = list(dict.fromkeys(point.values[key] for point in sweep.points if key in point.values))
    if len(words) < 2:
        return None
    title = text.plain(key.rpartition(".")[2], limit=18)
    numbers = [_number(word) for word in words]
    known = [number for number in numbers if number is not None]
    if len(known) == len(words) and len(words) > _MOST_TICKS:
        height, ticks = _to_scale(known, write=lambda value: f"{value:.3g}", log="log" in sweep.axes[key])
        return Scale(title=title, place=lambda point: _height(height, _number(point.values.get(key, ""))), ticks=ticks)
    ordered = sorted(words, key=lambda word: (_number(word) is None, _number(word) or 0.0))
    places = {word: place / (len(ordered) - 1) for place, word in enumerate(ordered)}
    shown = [(place, text.plain(short(word), limit=14)) for word, place in places.items()]
    every = max(1, math.ceil(len(shown) / _MOST_TICKS))
    return Scale(title=title, place=lambda point: places.get(point.values.get(key, "")), ticks=shown[::every])


def _of_objective(sweep: SweepRead, name: str, *, up: bool) -> Scale:
    """Make the axis of an objective, better up."""
    known = [value for point in sweep.finished if (value := point.measure(name)) is not None]
    height, ticks = _to_scale(known, write=lambda value: written(name, value), log=False)

    def turned(place: float) -> float:
        return place if up else 1.0 - place

    return Scale(
        title=title_of(name),
        place=lambda point: _height(lambda value: turned(height(value)), point.measure(name)),
        ticks=[(turned(place), words) for place, words in ticks],
    )


def _height(height: Callable[[float], float], value: float | None) -> float | None:
    return None if value is None else height(value)


def _to_scale(
    numbers: Sequence[float], *, write: Callable[[float], str], log: bool
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Return how high a number stands, and what to write at the ends and between."""
    low, high = min(numbers), max(numbers)
    if low == high:
        return lambda value: 0.5, [(0.5, write(low))]
    bend = math.log10 if low > 0 and (log or high / low > _MANY_TIMES) else float
    bottom, top = bend(low), bend(high)
    between = [bottom + share * (top - bottom) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    values = [10**place if bend is math.log10 else place for place in between]
    ticks = [((place - bottom) / (top - bottom), write(value)) for place, value in zip(between, values, strict=True)]
    return lambda value: (bend(value) - bottom) / (top - bottom), ticks


def _number(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def draw_front(sweep: SweepRead) -> Figure | None:
    """Draw the first objective against each other one; None with one objective or fewer than two points."""
    others = sweep.objectives[1:4]
    if not others or len(sweep.finished) < 2:
        return None
    figure = style.canvas(3.2)
    panels = figure.subplots(1, len(others), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, others, strict=True):
        _front_panel(panel, sweep, name, numbered=len(sweep.front) <= 15)
    panels[0].set_ylabel(title_of(sweep.objectives[0]))
    if sweep.directions[0] == "minimize":
        panels[0].invert_yaxis()
    return figure


def _front_panel(axes: Axes, sweep: SweepRead, name: str, *, numbered: bool) -> None:
    first = sweep.objectives[0]
    front = sweep.front
    for point in sweep.finished:
        x, y, best = point.measure(name) or 0.0, point.measure(first) or 0.0, point in front
        color = style.ROLES["student"] if best else _PALE
        axes.plot([x], [y], marker="o", ms=5.5 if best else 4.5, color=color, mec="white", mew=0.6, zorder=3 + best)
        if best:
            axes.plot([x], [y], marker="o", ms=9.5, mfc="none", mec=style.ROLES["student"], mew=0.9, zorder=4)
            if numbered:
                axes.annotate(
                    str(point.number), (x, y), xytext=(6, 5), textcoords="offset points", fontsize=7.5, zorder=5
                )
    values = [value for point in sweep.finished if (value := point.measure(name)) is not None]
    if min(values) > 0 and max(values) > 1.02 * min(values):
        axes.set_xscale("log")
        style.log_ticks(axes.xaxis)
    axes.margins(x=0.12, y=0.12)
    unit = {"latency_ms": ", ms", "size_bytes": ", bytes"}.get(name, "")
    axes.set_xlabel(f"{title_of(name)}{unit}")


def draw_history(sweep: SweepRead) -> Figure | None:
    """Draw the first objective of each point in the order of the points, and the best so far."""
    if len(sweep.finished) < 2:
        return None
    name, up = sweep.objectives[0], sweep.directions[0] == "maximize"
    figure = style.canvas(2.7)
    axes = figure.subplots()
    done = sorted(sweep.finished, key=lambda point: point.number)
    values = [point.measure(name) or 0.0 for point in done]
    best = [(max if up else min)(values[: place + 1]) for place in range(len(values))]
    numbers = [point.number for point in done]
    axes.plot(numbers, best, drawstyle="steps-post", color=style.ROLES["student"], lw=1.6, zorder=2)
    axes.plot(numbers, values, ls="", marker="o", ms=4.5, color=style.MUTED, mec="white", mew=0.6, zorder=3)
    lost = [point.number for point in sweep.points if point.status in ("pruned", "failed")]
    low, high = axes.get_ylim()
    axes.plot(
        lost, [low if up else high] * len(lost), ls="", marker="x", ms=5, color=style.ROLES["baseline"], clip_on=False
    )
    axes.set_ylim(low, high)
    axes.set_xlabel("point")
    axes.set_ylabel(title_of(name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
