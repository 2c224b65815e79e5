"""Draw our int8 and the peers' over the best float32 engine, one panel a batch size."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BARS = {"best fp32": ("ours", "#2a9d6f"), "NNCF over best fp32": ("NNCF in OpenVINO", "#b279a2")}
BARS |= {"ORT static over best fp32": ("ONNX Runtime static, exact sums", "#4c78a8")}


def _panel(axes: Any, parts: dict[str, Any], batch: str) -> None:
    names = list(parts)
    for place, (key, (label, colour)) in enumerate(BARS.items()):
        found = [parts[name]["batches"][batch]["ratios"].get(key) for name in names]
        spots = [y + 0.26 * (1 - place) for y, each in enumerate(found) if each]
        cpu = [each["cpu"] for each in found if each]
        values = [each["value"] for each in cpu]
        errors = [
            [max(each["value"] - each["low"], 0.0) for each in cpu],
            [max(each["high"] - each["value"], 0.0) for each in cpu],
        ]
        axes.barh(spots, values, height=0.25, xerr=errors, color=colour, ecolor="#333", label=label)
    axes.axvline(1.0, color="#333", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(f"batch {batch}", fontsize=10, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, Any], path: Path) -> None:
    figure, grid = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for axes, batch in zip(grid, ("1", "32"), strict=True):
        _panel(axes, results["parts"], batch)
    grid[1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.supxlabel("times faster than the best float32 engine, one thread", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
