"""Put names beside points and line ends so that they do not cover each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from lightning_opt.reporting.style import MUTED, PAPER

_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
_DISTANCES = (7.0, 16.0, 28.0, 44.0, 62.0)


@dataclass(frozen=True)
class Mark:
    """A point of a plot and its name, in data coordinates."""

    x: float
    y: float
    label: str
    color: str


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Push values apart until neighbours are `gap` apart, keeping order and staying in [low, high] where they fit.

    >>> spread([1.0, 1.0, 9.0], gap=2.0, low=0.0, high=10.0)
    [0.0, 2.0, 9.0]
    """
    if not values:
        return []
    order = np.argsort(values, kind="stable")
    # least movement under a minimum gap is isotonic regression of (value - rank * gap): pool adjacent violators
    pools: list[list[float]] = []
    for rank, place in enumerate(order):
        pools.append([values[place] - rank * gap, 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight = pools.pop()
            before, count = pools[-1]
            pools[-1] = [(before * count + mean * weight) / (count + weight), count + weight]
    base = [mean for mean, weight in pools for _ in range(int(weight))]
    top = high - (len(values) - 1) * gap
    base = [max(low, min(max(top, low), value)) for value in base]
    result = [0.0] * len(values)
    for rank, place in enumerate(order):
        result[place] = base[rank] + rank * gap
    return result


def label_ends(axes: Axes, marks: Sequence[Mark], *, size: float = 8.0) -> None:
    """Write each mark's name to the right of the axes at its height, pushed apart, with a thin lead where it moved."""
    _settle(axes)
    to_pixels, box = axes.transData.transform, axes.get_window_extent()
    scale = axes.get_figure(root=True).dpi / 72.0  # type: ignore[union-attr]
    heights = [float(np.clip(to_pixels((mark.x, mark.y))[1], box.y0, box.y1)) for mark in marks]
    for mark, height, place in zip(marks, heights, spread(heights, 1.35 * size * scale, box.y0, box.y1), strict=True):
        end = float(to_pixels((mark.x, mark.y))[0])
        moved = abs(place - height) > 0.3 * size * scale
        axes.annotate(
            mark.label,
            xy=(end, height),
            xycoords="figure pixels",
            xytext=(max(end, box.x1) + 8 * scale, place),
            textcoords="figure pixels",
            color=mark.color,
            fontsize=size,
            va="center",
            ha="left",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": mark.color, "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
            if moved
            else None,
        )


def label_points(axes: Axes, marks: Sequence[Mark], *, size: float = 8.0) -> None:
    """Write each mark's name beside its point where it covers no other name, point or edge."""
    _settle(axes)
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = figure.dpi / 72.0
    points = [axes.transData.transform((mark.x, mark.y)) for mark in marks]
    taken = [Bbox.from_extents(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in points]
    frame = axes.get_window_extent()
    for mark, point in sorted(zip(marks, points, strict=True), key=lambda pair: -pair[1][0]):
        extent = _extent(figure, mark.label, size)
        choices = [
            (distance, _box(point, extent, direction, distance * scale))
            for distance, direction in product(_DISTANCES, _DIRECTIONS)
        ]
        costs = [_cost(box, taken, frame) + 0.008 * rank for rank, (_, box) in enumerate(choices)]
        distance, box = choices[int(np.argmin(costs))]
        taken.append(box)
        far = distance > _DISTANCES[0]
        name = axes.annotate(
            mark.label,
            xy=(mark.x, mark.y),
            xytext=((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2),
            textcoords="figure pixels",
            ha="center",
            va="center",
            color=mark.color,
            fontsize=size,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.4, "shrinkA": 0, "shrinkB": 4} if far else None,
        )
        name.set_path_effects([withStroke(linewidth=2.0, foreground=PAPER)])


def _settle(axes: Axes) -> None:
    """Let the layout engine place the axes, so that pixel coordinates hold."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _extent(figure: Figure, words: str, size: float) -> tuple[float, float]:
    renderer: RendererAgg = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    probe = figure.text(0, 0, words, fontsize=size)
    box = probe.get_window_extent(renderer)
    probe.remove()
    return box.width, box.height


def _box(point: np.ndarray, extent: tuple[float, float], direction: tuple[int, int], distance: float) -> Bbox:
    width, height = extent
    reach = distance * (0.75 if all(direction) else 1.0)
    x = point[0] + direction[0] * (reach + width / 2)
    y = point[1] + direction[1] * (reach + height / 2)
    return Bbox.from_extents(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _cost(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Add up the shares of names and points that a name would cover, twice, and its share outside of the frame."""
    area = box.width * box.height
    box = Bbox.from_extents(box.x0 - 3, box.y0 - 1, box.x1 + 3, box.y1 + 1)
    covered = sum(_common(box, other) / min(area, other.width * other.height) for other in taken)
    outside = max(0.0, 1.0 - _common(box, frame) / area)
    return 2.0 * covered + outside


def _common(left: Bbox, right: Bbox) -> float:
    width = min(left.x1, right.x1) - max(left.x0, right.x0)
    height = min(left.y1, right.y1) - max(left.y0, right.y0)
    return max(width, 0.0) * max(height, 0.0)
