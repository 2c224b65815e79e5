"""Tables and figure from results.json."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from lightning_opt.reporting import style

_MARKS = {part: (f"<!-- {part}: written by run.py -->", f"<!-- end of {part} -->") for part in ("one-shot", "smaller")}
_LABELS = {"random": "random", "magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


def by_seed(runs: dict[str, dict[str, Any]], part: str = "test") -> dict[str, float]:
    """Average the perplexities of each dense net over its draws of calibration text."""
    found: dict[str, list[float]] = {}
    for key, row in runs.items():
        found.setdefault(key.split(".")[0], []).append(row[part])
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Write both tables in Markdown."""
    return {"one-shot": _one_shot(results), "smaller": _smaller(results)}


def _one_shot(results: dict[str, Any]) -> str:
    patterns = results.get("one_shot", {})
    dense = by_seed(results.get("dense", {}))
    lines = ["| | " + " | ".join(patterns) + " |", "|---|" + "---|" * len(patterns)]
    lines.append(f"| dense | {_mean(list(dense.values()))} |" + " |" * (len(patterns) - 1))
    for method, label in _LABELS.items():
        cells = [_mean(list(by_seed(runs[method]).values())) if method in runs else "" for runs in patterns.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(_orders(results))])


def _orders(results: dict[str, Any]) -> list[str]:
    """Say in how many nets the published order holds."""
    said = []
    dense = by_seed(results.get("dense", {}))
    for pattern, runs in results.get("one_shot", {}).items():
        if not all(method in runs for method in _LABELS):
            continue
        means = {method: by_seed(runs[method]) for method in _LABELS}
        seeds = [seed for seed in dense if all(seed in mean for mean in means.values())]
        best = sum(dense[s] < means["sparsegpt"][s] < min(means["wanda"][s], means["magnitude"][s]) for s in seeds)
        wanda = sum(means["wanda"][s] < means["magnitude"][s] for s in seeds)
        said.append(
            f"- {pattern}: dense < SparseGPT < Wanda and magnitude in {best} of {len(seeds)} nets; "
            f"Wanda below magnitude in {wanda}."
        )
    return said


def _smaller(results: dict[str, Any]) -> str:
    dense = by_seed(results.get("dense", {}))
    lines = ["| arm | parameters | steps | before training | perplexity (sd) | seeds |", "|---|---|---|---|---|---|"]
    one = next(iter(results.get("dense", {}).values()), {})
    steps = results["setting"]["dense_steps"]
    lines.append(f"| dense | {one.get('parameters', 0):,} | {steps} | | {_mean(list(dense.values()))} | {len(dense)} |")
    for arm, runs in results.get("smaller", {}).items():
        if not runs:
            continue
        first = next(iter(runs.values()))
        before = _mean([row["test_before"] for row in runs.values()], spread=False)
        values = list(by_seed(runs).values())
        cells = [arm, f"{first['parameters']:,}", f"{first['steps']}", before, _mean(values), f"{len(values)}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_gains(results)])


def _gains(results: dict[str, Any]) -> list[str]:
    arms, said = results.get("smaller", {}), []
    for kind in ("width", "depth"):
        ours = by_seed(arms.get(f"{kind}, pruned + distilled", {}))
        for other in ("scratch", "scratch + distilled", "pruned + text", "scratch, long"):
            theirs = by_seed(arms.get(f"{kind}, {other}", {}))
            seeds = [seed for seed in ours if seed in theirs]
            if seeds:
                wins = sum(ours[s] < theirs[s] for s in seeds)
                gain = np.mean([math.log(theirs[s]) - math.log(ours[s]) for s in seeds])
                said.append(
                    f"- {kind}: pruned + distilled below {other} in {wins} of {len(seeds)} nets, "
                    f"by {gain:+.3f} nats a character on average."
                )
    return said


def _mean(values: list[float], *, spread: bool = True) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}" if np.mean(values) < 100 else f"{np.mean(values):.0f}"
    return f"{mean} ({np.std(values, ddof=1):.3f})" if spread and len(values) > 1 else mean


def write_tables(readme: Path, words: dict[str, str]) -> None:
    """Put each table between its two marks of the README."""
    if not readme.exists():
        return
    text = readme.read_text()
    for part, (begin, end) in _MARKS.items():
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{words[part].strip()}\n\n{end}{rest.split(end)[1]}"
    readme.write_text(text)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the perplexities: on the left one-shot pruning, on the right smaller nets; a dot a dense net."""
    if not results.get("one_shot"):
        return
    rows_left = [(p, m) for p in results.get("one_shot", {}) for m in _LABELS if m in results["one_shot"][p]]
    arms = list(results.get("smaller", {}))
    with style.look():
        figure = style.canvas(1.3 + 0.27 * max(len(rows_left), len(arms)))
        left, right = figure.subplots(1, 2)
        dense = float(np.mean(list(by_seed(results["dense"]).values())))
        _dots(left, [(f"{m} {p}", results["one_shot"][p][m], _COLORS[m]) for p, m in rows_left], dense)
        _dots(right, [(arm, results["smaller"][arm], _color(arm)) for arm in arms], dense)
        left.set_xscale("log")
        style.log_ticks(left.xaxis)
        left.set_title("pruned at once, no training")
        right.set_title("smaller nets, trained")
        for axes in (left, right):
            axes.set_xlabel("perplexity a character; line: dense")
        style.save(figure, path)


_COLORS = {
    "random": style.MUTED,
    "magnitude": style.ROLES["baseline"],
    "wanda": style.ROLES["deployed"],
    "sparsegpt": style.ROLES["student"],
}


def _color(arm: str) -> str:
    if "pruned + distilled" in arm:
        return style.ROLES["student"]
    return style.ROLES["baseline"] if "scratch" in arm else style.MUTED


def _dots(axes: Any, rows: list[tuple[str, dict[str, Any], str]], dense: float) -> None:
    for place, (_, runs, color) in enumerate(reversed(rows)):
        values = list(by_seed(runs).values())
        if not values:
            continue
        axes.scatter(values, [place] * len(values), s=14, color=color, alpha=0.6, linewidths=0)
        mean = float(np.mean(values))
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color=color, linewidth=2)
    axes.axvline(dense, color=style.ROLES["teacher"], linewidth=1.0)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
    axes.grid(visible=False, axis="y")
