"""Draw the bubbles that were measured and where a step's time goes in pipelines that were simulated."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from orders import SCHEDULES

from lightning_opt.reporting.style import INK, MUTED, OTHERS, ROLES, canvas, look, save

COLOURS = {**dict(zip(SCHEDULES, (*ROLES.values(), OTHERS[0]), strict=True)), "no pipeline": MUTED}
CAUSES = {
    "splitting and issuing": OTHERS[2],
    "bubble": ROLES["baseline"],
    "messages": OTHERS[1],
    "all-reduce": OTHERS[3],
}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write all figures."""
    with look():
        _bubbles(results, folder / "bubbles.png")
        if "simulated" in results:
            machine = results["simulated"]["accelerators"]
            _lost(machine, folder / "lost_at_1024.png")
            _memory(machine, folder / "memory_at_256.png")
            _efficiency(results["simulated"], folder / "efficiency.png")


def _bubbles(results: dict[str, Any], path: Path) -> None:
    figure = canvas(2.6)
    panels = sorted({found["ranks"] for found in results["bubbles"].values()})
    for axes, ranks in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        found = {row["schedule"]: row for row in results["bubbles"].values() if row["ranks"] == ranks}
        names = [name for name in SCHEDULES if name in found][::-1]
        for y, name in enumerate(names):
            row = found[name]
            axes.barh(y, row["replayed"], color=ROLES["student"], height=0.55, zorder=2)
            axes.plot([row["replayed_low"], row["replayed_high"]], [y, y], color=INK, linewidth=1, zorder=3)
            axes.plot([row["theory"]] * 2, [y - 0.4, y + 0.4], color=ROLES["baseline"], linewidth=2, zorder=4)
            axes.text(max(row["replayed_high"], row["theory"]) + 0.005, y, f"{row['replayed']:.3f}", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.2 * max(max(row["replayed_high"], row["theory"]) for row in found.values()))
        axes.set_title(f"{ranks} ranks, {next(iter(found.values()))['micro_batches']} micro-batches")
        axes.set_xlabel("idle share of all ranks' time")
    marks = [
        Patch(color=ROLES["student"], label="measured operations, median and range"),
        Patch(color=ROLES["baseline"], label="theory"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def _points(machine: dict[str, Any], name: str, ranks: int) -> list[dict[str, Any]]:
    return [found for found in machine["points"] if found["schedule"] == name and found["ranks"] == ranks]


def _lost(machine: dict[str, Any], path: Path) -> None:
    """Where a step's time goes at 1,024 ranks, by the number of stages; cuts that do not fit are pale."""
    figure = canvas(2.9)
    names = ("1F1B", "interleaved 1F1B", "interleaved zero bubble")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        points = _points(machine, "no pipeline", 1024) + _points(machine, name, 1024)
        for x, found in enumerate(points):
            below = 0.0
            for cause, colour in CAUSES.items():
                share = max(found["lost"][cause], 0.0)
                axes.bar(
                    x, share, bottom=below, color=colour, width=0.7, alpha=1.0 if found["fits"] else 0.35, zorder=2
                )
                below += share
            if not found["fits"]:
                axes.text(x, below + 0.01, "no\nfit", ha="center", va="bottom", fontsize=7, color=MUTED)
        axes.set_xticks(range(len(points)), [str(found["stages"]) for found in points])
        axes.set_title(name)
        axes.set_xlabel("stages")
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1)
    figure.axes[0].set_ylabel("share of a step that is lost")
    marks = [Patch(color=colour, label=cause) for cause, colour in CAUSES.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def _memory(machine: dict[str, Any], path: Path) -> None:
    figure = canvas(2.8, right=0.21)
    axes = figure.subplots()
    for name in SCHEDULES:
        points, colour = _points(machine, name, 256), COLOURS[name]
        x = [found["stages"] for found in points]
        axes.plot(
            x,
            [(found["state_bytes"] + found["activation_bytes"]) / 1e9 for found in points],
            color=colour,
            marker="o",
            markersize=3,
        )
    states = _points(machine, "no pipeline", 256) + _points(machine, "GPipe", 256)
    axes.plot([f["stages"] for f in states], [f["state_bytes"] / 1e9 for f in states], color=MUTED, linestyle=":")
    limit = machine["memory_bytes"] / 1e9
    axes.axhline(limit, color=INK, linewidth=1)
    axes.annotate("a rank's memory", (1, limit), xytext=(0, 3), textcoords="offset points", va="bottom")
    ends = {name: _points(machine, name, 256)[-1] for name in SCHEDULES}
    lines = [("weights, optimizer", MUTED, states[-1]["state_bytes"])]
    lines += [(name, COLOURS[name], found["state_bytes"] + found["activation_bytes"]) for name, found in ends.items()]
    _labels(axes, lines)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.set_yticks([5, 10, 20, 50, 100, 200, 500], ["5", "10", "20", "50", "100", "200", "500"])
    axes.set_xlabel("stages, of 256 ranks")
    axes.set_ylabel("GB on the fullest rank")
    save(figure, path)


def _labels(axes: Axes, lines: list[tuple[str, str, float]]) -> None:
    """Write each line's name at its end; lines that end together share a label, others are pushed apart."""
    groups: list[tuple[str, str, float]] = []
    for name, colour, size_bytes in sorted(lines, key=lambda line: line[2]):
        if groups and size_bytes < 1.03 * groups[-1][2]:
            groups[-1] = (f"{groups[-1][0]}, {name}", colour, groups[-1][2])
        else:
            groups.append((name, colour, size_bytes))
    last = 0.0
    for name, colour, size_bytes in groups:
        at = max(size_bytes / 1e9, last * 1.22)
        words = name.replace(", interleaved zero bubble, ZBV", " and zero bubbles")
        label = axes.annotate(words, (64, at), xytext=(6, 0), textcoords="offset points", va="center", color=colour)
        label.set_annotation_clip(False)
        label.set_in_layout(False)
        last = at


def _efficiency(simulated: dict[str, Any], path: Path) -> None:
    figure = canvas(2.8)
    for axes, (name, machine) in zip(figure.subplots(1, len(simulated), sharey=True), simulated.items(), strict=True):
        for row in machine["breaks"]:
            x = [int(ranks) for ranks in row["best"]]
            y = [best["efficiency"] for best in row["best"].values()]
            axes.plot(x, y, color=COLOURS[row["schedule"]], marker="o", markersize=3, label=row["schedule"])
        axes.set_xscale("log", base=2)
        axes.set_xticks([128, 256, 512, 1024], ["128", "256", "512", "1,024"])
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("ranks")
        axes.set_title(name)
    figure.axes[0].set_ylabel("efficiency of the best cut that fits")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7, columnspacing=1.0, frameon=False)
    save(figure, path)
