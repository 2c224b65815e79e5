"""Draw what became smaller and faster, as ratios."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_opt.reporting import style, text
from lightning_opt.reporting.pruned import FORMS
from lightning_opt.reporting.ratios import engine_label

Record = Mapping[str, Any]


def gains_of(record: Record) -> list[tuple[str, float]]:
    """List (what, teacher / student) for all ratios that the comparison holds."""
    comparison = record["comparison"]
    names = {"params": "parameters", "params_nonzero": "non-zero parameters", "size": "size on disk"}
    names |= {"flops": "FLOPs", "memory": "peak memory"}
    gains = [(title, comparison.get(f"{key}_ratio")) for key, title in names.items()]
    if comparison.get("params_nonzero_ratio") == comparison.get("params_ratio"):
        gains = [gain for gain in gains if gain[0] != names["params_nonzero"]]
    if record.get("quantization"):
        return [(title, value) for title, value in gains if value] + _gains_of_quantization(record)
    if record.get("pruning") and "teacher" not in record["models"]:
        return [(title, value) for title, value in gains if value] + _gains_of_pruning(record)
    for row in comparison.get("latency_ratio") or ():
        gains.append((f"latency, batch {row['batch']}", row["value"]))
    return [(title, value) for title, value in gains if value]


def _gains_of_pruning(record: Record) -> list[tuple[str, float]]:
    """List the sizes on disk in other forms, and the latency in each engine at the smallest batch size."""
    sizes, rows = record["pruning"]["size_bytes"], record["pruning"]["latency"] or []
    gains = [
        (f"size, {FORMS[form]}", sizes["before"] / sizes[form]) for form in FORMS if form != "dense" and sizes.get(form)
    ]
    smallest = min((row["batch"] for row in rows), default=None)
    return gains + [
        (f"latency, batch {row['batch']}, {engine_label(row)}", row["ratio"])
        for row in rows
        if row["batch"] == smallest
    ]


def _gains_of_quantization(record: Record) -> list[tuple[str, float]]:
    """List the speed of the fastest file of few bits over the float model in its best engine, at each batch size."""
    found = []
    for row in record["comparison"].get("quantized") or ():
        for key, words in (("torch_eager", "torch eager"), ("best_fp32", "best fp32"), ("best_bf16", "best bf16")):
            if row[f"over_{key}"]:
                found.append((f"speed at batch {row['batch']}, over {words}", row[f"over_{key}"]))
    return found


def draw_gains(record: Record) -> Figure | None:
    """Draw the ratios as bars that start at 1: to the right what got better, to the left what got worse."""
    gains = gains_of(record)
    if not gains:
        return None
    figure = style.canvas(0.75 + 0.3 * len(gains))
    axes = figure.subplots()
    rows = np.arange(len(gains))[::-1]
    for row, (_, value) in zip(rows, gains, strict=True):
        better, same = value > 1, 0.98 < value < 1.02
        color = style.MUTED if same else style.ROLES["student" if better else "baseline"]
        axes.plot([1, value], [row, row], color=color, lw=7, solid_capstyle="butt", alpha=0.9)
        side = 1 if value >= 1 else -1
        axes.annotate(
            text.times(value),
            (value, row),
            xytext=(5 * side, 0),
            textcoords="offset points",
            va="center",
            ha="left" if side > 0 else "right",
            color=color,
            fontweight="bold",
        )
    values = [value for _, value in gains]
    axes.set_xscale("log")
    axes.set_xlim(min(0.9, 0.6 * min(values)) if min(values) < 1 else 0.93, 1.35 * max(max(values), 2.0))
    axes.set_ylim(-0.6, len(gains) - 0.4)
    axes.axvline(1, color=style.INK, lw=0.8)
    axes.set_yticks(rows, [text.plain(title, limit=36) for title, _ in gains])
    axes.tick_params(axis="y", labelcolor=style.INK)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    style.log_ticks(axes.xaxis, suffix="×")
    return figure
