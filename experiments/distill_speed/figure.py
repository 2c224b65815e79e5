"""Draw the median step of each contender, one panel a pair."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from table import NAMES, name_of

COLOURS = {
    "teacher": "#9aa5b1",
    "hand": "#4c78a8",
    "torchdistill": "#b279a2",
    "lightning": "#f2a541",
    "ours": "#2a9d6f",
}
LABELS = {
    "teacher": "teacher alone",
    "hand": "hand-written loop",
    "torchdistill": "torchdistill's loss",
    "lightning": "bare Lightning",
    "ours": "ours",
}


def _kind(name: str) -> str:
    return "teacher" if name.startswith("teacher ") else name.rpartition("_")[2]


def _panel(axes: Any, pair: dict[str, Any], title: str) -> None:
    steps = pair["steps"]
    names = [f"teacher {pair['teacher_mode']}", *(name for name in NAMES if name in steps)][::-1]
    unit, scale = ("µs", 1e3) if max(step["cpu_ms"] for step in steps.values()) < 10 else ("ms", 1.0)
    values = np.array([steps[name]["cpu_ms"] for name in names]) * scale
    edges = np.array([[steps[name]["cpu_ms_q25"], steps[name]["cpu_ms_q75"]] for name in names]).T * scale
    errors = np.abs(edges - values)
    axes.barh(names, values, xerr=errors, color=[COLOURS[_kind(name)] for name in names], ecolor="#333", capsize=2)
    teacher = min(step["cpu_ms"] for name, step in steps.items() if name.startswith("teacher "))
    alone = steps["ce_hand"]["cpu_ms"]
    end = max(edges.max(), (alone + teacher) * scale) * 1.08
    lines = ((alone, "student"), (alone + teacher, "student + teacher"))
    # Two labels side by side would cover each other where the teacher costs next to nothing.
    for at, text in lines if teacher * scale > 0.2 * end else lines[1:]:
        axes.axvline(at * scale, color="#333", linestyle=":", linewidth=1)
        above: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points"}
        axes.annotate(text, (at * scale, 1), ha="center", va="bottom", fontsize=8, **above)
    for y, value in enumerate(values):
        text, fits = f"{value:,.0f}" if value >= 100 else f"{value:.1f}", value > 0.1 * end
        spot: dict[str, Any] = {
            "xytext": (4 if fits else 10, 0),
            "textcoords": "offset points",
            "va": "center",
            "fontsize": 8,
        }
        axes.annotate(text, (0 if fits else value, y), color="white" if fits else "#333", fontweight="bold", **spot)
    axes.set_yticks(range(len(names)), [name_of(name) for name in names], fontsize=8)
    axes.set_xlabel(f"CPU {unit} a step, median and quartiles", fontsize=8)
    axes.set_title(f"{title}, batch {pair['batch']}", fontsize=10, pad=18, loc="left", fontweight="bold")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, end)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, Any], path: Path) -> None:
    pairs = results["pairs"]
    rows = (len(pairs) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(13, 4.1 * rows), squeeze=False, layout="constrained")
    for axes, (name, pair) in zip(grid.flat, pairs.items(), strict=False):
        _panel(axes, pair, name)
    for axes in list(grid.flat)[len(pairs) :]:
        axes.set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(
        handles, [LABELS[key] for key in COLOURS], loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
