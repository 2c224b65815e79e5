"""One look for every figure: thin lines, direct labels, colours that colour-blind readers can tell apart."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lightning_opt.reporting import text

INK, MUTED, GRID, PAPER = "#1f2430", "#6b7280", "#e7e9ee", "#ffffff"
ROLES = {"teacher": "#4b5563", "baseline": "#d55e00", "student": "#0072b2", "deployed": "#009e73"}
OTHERS = ("#cc79a7", "#b8860b", "#56b4e9", "#7b3fa0", "#8c564b", "#117733")
MARKERS = {"teacher": "s", "baseline": "^", "student": "o", "deployed": "D"}
WIDTH_INCHES, DPI = 7.2, 200

_LOOK: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # names come from users: a dollar sign is a dollar sign
    "text.usetex": False,
    "axes.edgecolor": "#c3c8d1",
    "axes.linewidth": 0.7,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": "#c3c8d1",
    "ytick.color": "#c3c8d1",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


@contextmanager
def look() -> Iterator[None]:
    """Draw in our style inside the block, whatever the user's matplotlib settings are; they are untouched after it."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_LOOK)
        yield


def canvas(height_inches: float, *, right: float = 0.0) -> Figure:
    """Make an empty figure of the one width, bound to no window; a share `right` of it is kept for labels."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout="constrained")
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=0.06, h_pad=0.06, wspace=0.05, hspace=0.05, rect=(0.0, 0.0, 1.0 - right, 1.0))
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.print_png(path, metadata={"Software": None})  # savefig would draw everything twice
    return path


def color(role: str, position: int = 0) -> str:
    """Give a role its own colour, everything else one of the others in turn."""
    return ROLES.get(role, OTHERS[position % len(OTHERS)])


def log_ticks(axis: Axis, *, suffix: str = "") -> None:
    """Write plain numbers on a logarithmic axis: 1, 2, 5, 10 ... where it spans little, powers of ten elsewhere."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    steps: tuple[float, ...] = (1.0, 2.0, 5.0) if decades < 2.3 else (1.0,)
    if decades < 0.7:
        steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(base=10, subs=steps, numticks=15))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{plain_number(value)}{suffix}"))


def plain_number(value: float) -> str:
    """Write an axis number without needless digits: `0.5`, `20`, `5 k`."""
    if value >= 1000:
        return text.count(value).replace(".00", "").replace(".0", "")
    return f"{value:g}"


def note(axes: Axes, words: str) -> None:
    """Say in an empty plot why it is empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=MUTED)
