"""Draw the share of the promised speed-up that each way of cutting reaches, one panel a target."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"latency-aware": "#2a9d6f", "Torch-Pruning": "#b279a2", "uniform": "#4c78a8", "global": "#f2a541"}


def _colour(name: str) -> str:
    return next((colour for key, colour in COLOURS.items() if key in name), "#9aa5b1")


def _panel(axes: Any, part: dict[str, Any], title: str) -> None:
    arms = {name: arm for name, arm in part["arms"].items() if name != "dense"}
    names = list(arms)[::-1]
    values = [arms[name]["best_efficiency"] for name in names]
    edges = [[arms[name]["best_speedup"][key] / arms[name]["mac_ratio"] for name in names] for key in ("low", "high")]
    errors = [
        [max(value - low, 0.0) for value, low in zip(values, edges[0], strict=True)],
        [max(high - value, 0.0) for value, high in zip(values, edges[1], strict=True)],
    ]
    axes.barh(names, values, xerr=errors, color=[_colour(name) for name in names], ecolor="#333", capsize=2)
    limit = arms[names[0]]["limit"]
    axes.axvline(limit, color="#c0392b", linestyle=":", linewidth=1.4)
    axes.axvline(1.0, color="#333", linewidth=0.8)
    for y, name in enumerate(names):
        text = f"{values[y]:.2f}  ({arms[name]['best_speedup']['value']:.1f}x of {arms[name]['mac_ratio']:.1f}x)"
        axes.annotate(text, (0.02, y), va="center", fontsize=8, color="white", fontweight="bold")
    axes.set_xlim(0, max(1.15, *(edge * 1.03 for edge in edges[1])))
    axes.set_title(f"{title}   (must reach {limit})", fontsize=10, loc="left", fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, Any], path: Path) -> None:
    panels = {f"ResNet-50, 1/{target} of the MACs": part for target, part in results["parts"]["resnet50"].items()}
    if "bert" in results["parts"]:
        panels["BERT-base layers"] = results["parts"]["bert"]
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(15, 4.2 * rows), squeeze=False, layout="constrained")
    for axes, (title, part) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, part, title)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("measured speed-up / ratio of multiply-accumulates, each network in its best engine", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
