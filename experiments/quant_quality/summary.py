"""Numbers, tables and the figure from results.json."""

from pathlib import Path
from typing import Any

import numpy as np

from lightning_opt.reporting import style

MARKS = ("<!-- tables: written by run.py -->", "<!-- end of tables -->")
TRAINED = {
    "qat": "ours, QAT",
    "qat_mse": "ours, QAT, ranges of weights by MSE",
    "lsq": "ours, learned steps",
    "lsq_mse": "ours, learned steps from MSE ranges, their rate x 0.03",
    "nncf_qat": "NNCF",
    "modelopt_qat": "modelopt",
    "torchao_qat": "torchao (linear layers alone, dynamic)",
}
POST = {
    "ptq": "ours",
    "nncf_ptq": "NNCF",
    "modelopt_ptq": "modelopt",
    "torchao_ptq": "torchao (linear layers alone, dynamic)",
}
IMPROVEMENTS = {
    "smooth": "SmoothQuant",
    "equalize": "cross-layer equalization",
    "bias": "bias correction",
    "adaround": "AdaRound",
    "gptq": "GPTQ",
    "gptq_bias": "GPTQ, bias correction",
    "mse": "ranges of weights by MSE",
    "mse_percentile": "... and of activations by percentile",
    "mse_entropy": "... and of activations by entropy",
}
DROP, RECOVER = 0.3, {"4": 90, "2": 70}  # points; percent by bits of weights
WORTH = 1.0  # a share of a loss below so many points says nothing


def accuracies(entry: dict[str, Any], arm: str, what: str = "acc") -> dict[str, float]:
    """Return an arm's test figures by seed."""
    return {seed: row["test"][what] for seed, row in entry.get("arms", {}).get(arm, {}).items()}


def over(entry: dict[str, Any], arm: str, other: str, what: str = "acc") -> np.ndarray:
    """Return differences of two arms, seed by seed."""
    mine, theirs = accuracies(entry, arm, what), accuracies(entry, other, what)
    return np.array([mine[seed] - theirs[seed] for seed in mine if seed in theirs])


def recovered(entry: dict[str, Any], arm: str, loss: str) -> tuple[float, float]:
    """Return the mean points that an arm wins over `loss`, and those that `loss` is below float, on common seeds."""
    seeds = set(accuracies(entry, arm)) & set(accuracies(entry, loss)) & set(accuracies(entry, "fp32"))
    if not seeds:
        return float("nan"), float("nan")
    mine, low, high = ([accuracies(entry, name)[seed] for seed in sorted(seeds)] for name in (arm, loss, "fp32"))
    return float(np.mean(mine) - np.mean(low)), float(np.mean(high) - np.mean(low))


def tables(results: dict[str, Any]) -> str:
    """Write the tables in Markdown."""
    pairs = {name: entry for name, entry in results["pairs"].items() if entry.get("arms", {}).get("fp32")}
    lines = ["**Test accuracy, mean (standard deviation) over seeds; all arms of a column took the same steps**", ""]
    lines += [*_accuracies(pairs), "", "**What must hold**", "", *_conditions(pairs), ""]
    lines += ["**Points that an improvement of post-training quantization adds (cross-entropy, nats)**", ""]
    return "\n".join([*lines, *_improvements(pairs)])


def _accuracies(pairs: dict[str, Any]) -> list[str]:
    heads = [f"{name}, {len(accuracies(entry, 'fp32'))} seeds" for name, entry in pairs.items()]
    lines = [f"| weights | arm | {' | '.join(heads)} |", f"|---|---|{'---|' * len(pairs)}"]
    rows: list[tuple[str, str, str]] = [("float", "without the extra steps", "float"), ("float", "with them", "fp32")]
    for bits in ("8", "4", "2"):
        rows += [(f"W{bits}A8", f"after training, {label}", f"{arm}_w{bits}") for arm, label in POST.items()]
        rows += [(f"W{bits}A8", f"trained with it, {label}", f"{arm}_w{bits}") for arm, label in TRAINED.items()]
    rows.insert(3, ("W8A8", "after training, ours, dynamic", "ptq_w8_dynamic"))
    for bits, label, arm in rows:
        cells = [_mean(accuracies(entry, arm), len(accuracies(entry, "fp32"))) for entry in pairs.values()]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {bits} | {label} | {' | '.join(cells)} |")
    return lines


def _mean(found: dict[str, float], count: int) -> str:
    if not found:
        return "-"
    values = np.array(list(found.values()))
    spread = f" ({values.std(ddof=1):.2f})" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}" + (f", {len(values)} seeds" if len(values) < count else "")


def _conditions(pairs: dict[str, Any]) -> list[str]:
    lines = [f"| condition | {' | '.join(pairs)} | all |", f"|---|{'---:|' * (len(pairs) + 1)}"]
    drops = [-over(entry, "ptq_w8", "fp32") for entry in pairs.values()]
    cells = [f"{drop.mean():+.2f}" if len(drop) else "-" for drop in drops]
    mean = float(np.mean([drop.mean() for drop in drops if len(drop)])) if any(map(len, drops)) else float("nan")
    lines.append(f"| W8A8 after training is at most {DROP} points below float | {' | '.join(cells)} | {mean:+.2f} |")
    for bits, share in RECOVER.items():
        for arm, label in TRAINED.items():
            found = [recovered(entry, f"{arm}_w{bits}", f"ptq_w{bits}") for entry in pairs.values()]
            if all(np.isnan(won) for won, _ in found):
                continue
            limit = f" (>= {share} %)" if label.startswith("ours") else ""
            cells = [_share(*one) for one in found]
            telling = [one for one in found if one[1] >= WORTH]  # elsewhere there is nothing to win back
            won, lost = (float(np.sum([one[place] for one in telling])) for place in (0, 1))
            name = f"W{bits}A8 training wins back of what our W{bits}A8 loses after training: {label}{limit}"
            lines.append(f"| {name} | {' | '.join(cells)} | {f'{100 * won / lost:.0f} %' if lost else '-'} |")
    return lines


def _share(won: float, lost: float) -> str:
    if np.isnan(won):
        return "-"
    return f"{100 * won / lost:.0f} % of {lost:.1f}" if lost >= WORTH else f"{won:+.1f} of {lost:.1f}"


def _improvements(pairs: dict[str, Any]) -> list[str]:
    lines = [f"| weights | improvement | {' | '.join(pairs)} |", f"|---|---|{'---|' * len(pairs)}"]
    for bits in ("4", "2"):
        bare = [_mean(accuracies(entry, f"ptq_w{bits}"), 0) for entry in pairs.values()]
        losses = [accuracies(entry, f"ptq_w{bits}", "nll") for entry in pairs.values()]
        shown = [
            f"{cell} ({np.mean(list(nll.values())):.3f})" if nll else cell
            for cell, nll in zip(bare, losses, strict=True)
        ]
        lines.append(f"| W{bits}A8 | none: accuracy | {' | '.join(shown)} |")
        for key, label in IMPROVEMENTS.items():
            arm, base = f"ptq_w{bits}_{key}", f"ptq_w{bits}"
            cells = [_gain(over(entry, arm, base), over(entry, arm, base, "nll")) for entry in pairs.values()]
            if any(cell != "-" for cell in cells):
                lines.append(f"| W{bits}A8 | {label} | {' | '.join(cells)} |")
    return lines


def _gain(points: np.ndarray, nats: np.ndarray) -> str:
    return f"{points.mean():+.2f} ({nats.mean():+.3f})" if len(points) else "-"


def write_tables(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw the accuracy of each arm over the bits of the weights, one panel a pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = {
        "ptq": style.MUTED,
        "ptq best": style.OTHERS[0],
        "qat": style.ROLES["student"],
        "lsq": style.ROLES["deployed"],
    }
    arms |= {"modelopt_qat": style.OTHERS[1], "nncf_qat": style.OTHERS[2]}
    pairs = {name: entry for name, entry in results["pairs"].items() if entry.get("arms", {}).get("fp32")}
    figure, grid = plt.subplots(1, len(pairs), figsize=(3.6 * len(pairs), 3.6), layout="constrained", squeeze=False)
    for axes, (name, entry) in zip(grid[0], pairs.items(), strict=True):
        for arm, colour in arms.items():
            points = {bits: _height(entry, arm, bits) for bits in ("8", "4", "2")}
            known = {bits: value for bits, value in points.items() if value is not None}
            places = [("8", "4", "2").index(bits) for bits in known]
            axes.plot(places, list(known.values()), marker="o", color=colour, label=arm)
        level = float(np.mean(list(accuracies(entry, "fp32").values())))
        axes.axhline(level, color=style.INK, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(3), ["W8A8", "W4A8", "W2A8"])
        axes.set_title(name, fontsize=10, loc="left", fontweight="bold")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("test accuracy, %")
    grid[0][-1].legend(fontsize=7, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "bits.png", dpi=130)
    plt.close(figure)


def _height(entry: dict[str, Any], arm: str, bits: str) -> float | None:
    if arm != "ptq best":
        values = list(accuracies(entry, f"{arm}_w{bits}").values())
        return float(np.mean(values)) if values else None
    tries = [list(accuracies(entry, f"ptq_w{bits}_{key}").values()) for key in IMPROVEMENTS]
    return max((float(np.mean(values)) for values in tries if values), default=None)
