"""Numbers, tables and figures from results.json."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lightning_opt.reporting import style

SHARES = ("90", "95", "98")
SPARSE = {
    "gradual": "gradual, our recipe",
    "gradual_erk": "gradual, ERK",
    "gradual_lamp": "gradual, LAMP",
    "gradual_global": "gradual, global",
    "one_shot": "one-shot + fine-tune",
    "second_half": "gradual in the second half",
    "self": "second half + KD from the unpruned self",
    "lightning": "Lightning ModelPruning",
    "torch": "torch.nn.utils.prune + fine-tune",
    "random": "random masks, gradual",
    "small": "small dense net from scratch",
}
STRUCTURED = {
    "structured": "structured, L2 of all that goes",
    "structured_taylor": "structured, Taylor",
    "structured_second_half": "structured in the second half",
    "structured_self": "second half + KD from the unpruned self",
    "structured_random": "random units",
    "structured_scratch": "the same shape from scratch",
}
_CLAIMS = [("gradual", other) for other in ("one_shot", "lightning", "torch", "random", "small")]
_COLORS = {
    "gradual": style.ROLES["student"],
    "one_shot": style.OTHERS[2],
    "lightning": style.ROLES["baseline"],
    "torch": style.OTHERS[1],
    "random": style.MUTED,
    "small": style.OTHERS[0],
    "self": style.ROLES["deployed"],
}
_MARKS = {part: (f"<!-- {part}: written by run.py -->", f"<!-- end of {part} -->") for part in ("sparse", "structured")}


def best_recipe(looks: dict[str, Any]) -> str:
    """Return the recipe with the best mean accuracy over validation parts and sparsities."""
    means = look_means(looks)
    return max(sorted(means), key=lambda recipe: means[recipe])


def look_means(looks: dict[str, Any]) -> dict[str, float]:
    """Average each recipe's validation accuracy."""
    found: dict[str, list[float]] = {}
    for pair in looks.values():
        for key, runs in pair.items():
            found.setdefault(key.split("@")[0], []).extend(runs.values())
    return {recipe: float(np.mean(values)) for recipe, values in found.items()}


def tests(entry: dict[str, Any], arm: str) -> dict[str, float]:
    """Return an arm's test accuracies by seed."""
    return {seed: row["test"] for seed, row in entry.get("arms", {}).get(arm, {}).items()}


def difference(entry: dict[str, Any], arm: str, other: str) -> dict[str, Any]:
    """Compare two arms, seed by seed."""
    mine, theirs = tests(entry, arm), tests(entry, other)
    gaps = np.array([mine[seed] - theirs[seed] for seed in mine if seed in theirs])
    if not len(gaps):
        return {}
    sd = float(gaps.std(ddof=1)) if len(gaps) > 1 else 0.0
    return {
        "mean": float(gaps.mean()),
        "worst": float(gaps.min()),
        "better": int((gaps > 0).sum()),
        "seeds": len(gaps),
        "t": float(gaps.mean()) / (sd / math.sqrt(len(gaps))) if sd else math.nan,
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Write the tables in Markdown."""
    pairs = {name: entry for name, entry in results["pairs"].items() if entry.get("arms", {}).get("dense")}
    sparse = [f"Our recipe's allocation: {results.get('recipe')} (validation: {_looks(results)}).", ""]
    for name, entry in pairs.items():
        sparse += [*_sparse(name, entry), ""]
    sparse += [*_claims(pairs), "", _defaults(results)]
    structured = [line for name, entry in pairs.items() for line in [*_structured(name, entry), ""]]
    return {"sparse": "\n".join(sparse), "structured": "\n".join(structured)}


def _looks(results: dict[str, Any]) -> str:
    return ", ".join(f"{recipe} {mean:.2f} %" for recipe, mean in look_means(results["looks"]).items())


def _sparse(name: str, entry: dict[str, Any]) -> list[str]:
    dense = tests(entry, "dense")
    steps = next(iter(entry["arms"]["dense"].values()))["steps"]
    lines = [
        f"**{name}**: dense {_mean(dense)} %, {entry['parameters']:,} parameters, {steps} steps, {len(dense)} seeds"
    ]
    lines += [
        "",
        "| arm | " + " | ".join(f"{share} % zeros" for share in SHARES) + " |",
        "|---|" + "---|" * len(SHARES),
    ]
    for arm, label in SPARSE.items():
        found = [tests(entry, f"{arm}@{share}") for share in SHARES]
        if any(found):
            lines.append(f"| {label} | " + " | ".join(_mean(one, count=len(dense)) for one in found) + " |")
    return lines


def _claims(pairs: dict[str, Any]) -> list[str]:
    lines = ["| our recipe minus | zeros | " + " | ".join(pairs) + " |", "|---|---|" + "---|" * len(pairs)]
    for arm, other in _CLAIMS:
        for share in SHARES:
            gaps = [difference(entry, f"{arm}@{share}", f"{other}@{share}") for entry in pairs.values()]
            if any(gaps):
                lines.append(f"| {SPARSE[other]} | {share} % | " + " | ".join(map(_gap, gaps)) + " |")
    return lines


def _structured(name: str, entry: dict[str, Any]) -> list[str]:
    dense = next(iter(entry["arms"]["dense"].values()))
    lines = [f"**{name}**: dense {_mean(tests(entry, 'dense'))} %, {dense['macs']:,} multiply-accumulates", ""]
    lines += ["| arm | multiply-accumulates | parameters | test % (sd) | minus dense |", "|---|---|---|---|---|"]
    for arm, label in STRUCTURED.items():
        rows = list(entry["arms"].get(arm, {}).values())
        if rows:
            left = f"{rows[0]['macs'] / dense['macs']:.2f}x | {rows[0]['nonzero'] / entry['parameters']:.2f}x"
            lines.append(f"| {label} | {left} | {_mean(tests(entry, arm))} | {_gap(difference(entry, arm, 'dense'))} |")
    return lines


def _defaults(results: dict[str, Any]) -> str:
    said = []
    for name, entry in results["pairs"].items():
        for arm, rows in entry.get("as_documented", {}).items():
            for row in rows.values():
                said.append(f"amount={arm} on {name}: {row['sparsity']:.3%} zeros, test {row['test']:.2f} %")
    return "`ModelPruning` told a constant share, with its defaults: " + "; ".join(said) + "."


def _mean(runs: dict[str, float], *, count: int | None = None) -> str:
    values = list(runs.values())
    if not values:
        return ""
    words = f"{np.mean(values):.2f}" + (f" ({np.std(values, ddof=1):.2f})" if len(values) > 1 else "")
    return words if count in (None, len(values)) else f"{words}, {len(values)} seed{'s' * (len(values) > 1)}"


def _gap(gap: dict[str, Any]) -> str:
    if not gap:
        return ""
    return f"{gap['mean']:+.2f}, worst {gap['worst']:+.2f}, better {gap['better']}/{gap['seeds']}"


def write_tables(readme: Path, words: dict[str, str]) -> None:
    """Put each table between its two marks of the README."""
    if not readme.exists():
        return
    text = readme.read_text()
    for part, (begin, end) in _MARKS.items():
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{words[part].strip()}\n\n{end}{rest.split(end)[1]}"
    readme.write_text(text)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw both figures."""
    pairs = {name: entry for name, entry in results["pairs"].items() if entry.get("arms", {}).get("dense")}
    if not pairs:
        return
    with style.look():
        style.save(_draw_sparse(pairs), folder / "sparsity.png")
        style.save(_draw_structured(pairs), folder / "structured.png")


def _draw_sparse(pairs: dict[str, Any]) -> Any:
    figure = style.canvas(3.6)
    panels = np.atleast_1d(figure.subplots(1, len(pairs), sharey=True))
    for axes, (name, entry) in zip(panels, pairs.items(), strict=True):
        _draw_pair(axes, entry)
        axes.set_title(name)
        axes.set_xlabel("zeros, % of the weights")
    panels[0].set_ylabel("test error, %, log scale")
    panels[0].yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 40, 80]))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].yaxis.set_minor_locator(NullLocator())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=3,
        frameon=False,
        fontsize=7.5,
        columnspacing=1.0,
        handlelength=1.4,
    )
    return figure


def _draw_pair(axes: Axes, entry: dict[str, Any]) -> None:
    for place, (arm, color) in enumerate(_COLORS.items()):
        xs, means = [], []
        for x, share in enumerate(SHARES):
            errors = [max(100.0 - value, 0.05) for value in tests(entry, f"{arm}@{share}").values()]
            if errors:
                at = x + 0.055 * (place - 3)
                axes.plot([at] * len(errors), errors, ".", color=color, alpha=0.45, markersize=4, markeredgewidth=0)
                xs.append(at)
                means.append(float(np.mean(errors)))
        if xs:
            mark = "o" if arm == "gradual" else "_"
            axes.plot(xs, means, mark + "-", color=color, markersize=5, linewidth=1.2, label=SPARSE[arm])
    dense = 100.0 - float(np.mean(list(tests(entry, "dense").values())))
    axes.axhline(dense, color=style.INK, linewidth=0.8, linestyle=":", label="dense")
    axes.set_yscale("log")
    axes.set_xticks(range(len(SHARES)), SHARES)


def _draw_structured(pairs: dict[str, Any]) -> Any:
    arms = [arm for arm in STRUCTURED if any(entry["arms"].get(arm) for entry in pairs.values())]
    figure = style.canvas(1.1 + 0.3 * len(arms))
    panels = np.atleast_1d(figure.subplots(1, len(pairs), sharey=True))
    for axes, (name, entry) in zip(panels, pairs.items(), strict=True):
        dense = tests(entry, "dense")
        axes.axvspan(-0.5, 0.0, color=style.GRID, linewidth=0, zorder=0)
        axes.axvline(0.0, color=style.INK, linewidth=0.8, linestyle=":")
        for place, arm in enumerate(reversed(arms)):
            gaps = [value - dense[seed] for seed, value in tests(entry, arm).items() if seed in dense]
            if not gaps:
                continue
            ours = arm in ("structured", "structured_taylor")
            color = style.ROLES["student" if ours else "deployed" if "self" in arm else "baseline"]
            axes.scatter(gaps, place + np.linspace(-0.15, 0.15, len(gaps)), s=13, color=color, alpha=0.6, linewidths=0)
            axes.plot([np.mean(gaps)] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2.2)
        axes.set_title(name)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(arms)), [STRUCTURED[arm] for arm in reversed(arms)])
    panels[len(pairs) // 2].set_xlabel(
        "test accuracy minus dense, points; half the multiply-accumulates; grey: 0.5 lost"
    )
    return figure
