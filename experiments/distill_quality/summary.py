"""Numbers, table and figures from results.json."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from lightning_opt.reporting import style

LABELS = {
    "alone": "student alone",
    "alone_versions": "student alone, on the versions",
    "label_smoothing": "alone, label smoothing 0.1",
    "random_teacher": "KD from a teacher that knows nothing",
    "kd": "KD T=4 (ours)",
    "torchdistill_kd": "KD T=4 (torchdistill)",
    "torchdistill_logit_std": "Logit std. (torchdistill)",
    "dkd": "DKD (ours)",
    "first_choice": "winner of six losses (first round)",
    "torchdistill_kd_versions": "KD T=4 (torchdistill) + versions",
    "torchdistill_logit_std_versions": "Logit std. (torchdistill) + versions",
    "ours": "our recipe: KD + versions",
}
_BEGIN, _END = "<!-- table: written by run.py -->", "<!-- end of table -->"
_ROLE = {"alone": "baseline", "ours": "student"}


def summarise(entry: dict[str, Any]) -> dict[str, Any]:
    """Return, for each arm, mean test accuracy, the paired gain over the student alone, and the gap closure."""
    alone, teacher = entry["arms"]["alone"], entry["teacher"]["test"]
    rows = {}
    for arm, runs in entry["arms"].items():
        seeds = [seed for seed in runs if seed in alone]
        got = np.array([runs[seed]["test"] for seed in seeds])
        base = np.array([alone[seed]["test"] for seed in seeds])
        if not seeds:
            continue
        gain, row = got - base, {"seeds": len(seeds), "test_mean": got.mean()}
        if len(seeds) > 1:
            row |= {"test_sd": got.std(ddof=1)}
        if arm != "alone":
            row |= {"gain_mean": gain.mean(), "gain_min": gain.min(), "wins": int((gain > 0).sum())}
            row |= {"closure_percent": 100.0 * (gain / (teacher - base)).mean()}
            sd = gain.std(ddof=1) if len(seeds) > 1 else 0.0
            if sd > 0:
                row |= {"gain_sd": sd, "gain_t": gain.mean() / (sd / math.sqrt(len(seeds)))}
        rows[arm] = {
            name: round(float(value), 3) if name not in ("seeds", "wins") else value for name, value in row.items()
        }
    return rows


def table(results: dict[str, Any]) -> str:
    """Write a Markdown table for each pair."""
    lines = []
    for name, entry in results["pairs"].items():
        if "summary" not in entry:
            continue
        lines += [f"\n**{name}**: teacher {entry['teacher']['test']:.2f} %\n"]
        lines += [
            "| arm | seeds | test % (sd) | gain (sd) | worst seed | better in | t | closure |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for arm in (arm for arm in LABELS if arm in entry["summary"]):
            row = entry["summary"][arm]
            cells = [LABELS[arm], f"{row['seeds']}", f"{row['test_mean']:.2f} ({row.get('test_sd', 0):.2f})"]
            if arm == "alone":
                cells += ["", "", "", "", "0 %"]
            else:
                cells += [f"{row['gain_mean']:+.2f} ({row.get('gain_sd', 0):.2f})", f"{row['gain_min']:+.2f}"]
                cells += [f"{row['wins']}/{row['seeds']}", f"{row.get('gain_t', math.nan):.1f}"]
                cells += [f"{row['closure_percent']:.0f} %"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _mean_line(results)])


def mean_closure(results: dict[str, Any]) -> dict[str, float]:
    """Return each arm's gap closure in percent, averaged over the pairs."""
    summaries = [entry["summary"] for entry in results["pairs"].values() if "summary" in entry]
    if not summaries:
        return {}
    arms = [arm for arm in LABELS if arm != "alone" and all(arm in summary for summary in summaries)]
    return {arm: float(np.mean([summary[arm]["closure_percent"] for summary in summaries])) for arm in arms}


def _mean_line(results: dict[str, Any]) -> str:
    parts = [f"{LABELS[arm]} {value:.0f} %" for arm, value in mean_closure(results).items()]
    return "Closure, mean of the pairs: " + "; ".join(parts) + "."


def write_table(readme: Path, words: str) -> None:
    """Put the table between the two marks of the README."""
    if readme.exists():
        before, rest = readme.read_text().split(_BEGIN)
        readme.write_text(f"{before}{_BEGIN}\n{words.strip()}\n\n{_END}{rest.split(_END)[1]}")


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw one figure a pair: a dot a seed, a bar at the mean, a line at the teacher."""
    for name, entry in results["pairs"].items():
        if "summary" in entry:
            with style.look():
                style.save(_figure(name, entry), folder / f"{name}.png")


def _figure(name: str, entry: dict[str, Any]) -> Any:
    arms = [arm for arm in LABELS if arm in entry["summary"]]
    figure = style.canvas(0.9 + 0.33 * len(arms))
    axes = figure.add_subplot()
    for place, arm in enumerate(reversed(arms)):
        got = [run["test"] for run in entry["arms"][arm].values()]
        color = style.ROLES[_ROLE[arm]] if arm in _ROLE else style.MUTED
        spread = np.linspace(-0.17, 0.17, len(got)) if len(got) > 1 else np.zeros(1)
        axes.scatter(got, place + spread, s=13, color=color, alpha=0.55, linewidths=0)
        mean = float(np.mean(got))
        axes.plot([mean, mean], [place - 0.32, place + 0.32], color=color, linewidth=2.2)
        axes.annotate(
            f"{mean:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=color,
            annotation_clip=False,
        )
    axes.axvline(entry["summary"]["alone"]["test_mean"], color=style.ROLES["baseline"], linewidth=0.8, linestyle=":")
    axes.axvline(entry["teacher"]["test"], color=style.ROLES["teacher"], linewidth=1.0)
    axes.annotate(
        f"teacher {entry['teacher']['test']:.2f}",
        (entry["teacher"]["test"], 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 3),
        textcoords="offset points",
        ha="right",
        color=style.ROLES["teacher"],
    )
    axes.set_yticks(range(len(arms)), [LABELS[arm] for arm in reversed(arms)])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("test accuracy, %; a dot a seed, a bar at the mean, dotted: student alone")
    ratio = entry["teacher"]["parameters"] / entry["student"]["parameters"]
    axes.set_title(
        f"{name}: student {entry['student']['parameters']:,} parameters, {ratio:.0f}x fewer than the teacher", pad=16
    )
    return figure
