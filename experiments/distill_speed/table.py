"""Turn step times into medians, paired ratios with intervals, and one table."""

from pathlib import Path
from typing import Any

import numpy as np
from relay import Times

MARKS = ("<!-- table -->", "<!-- end of table -->")
# Name: above the line, below the line, the limit that must hold, and what it says.
RATIOS: dict[str, tuple[list[str], list[str], float | None, str]] = {
    "live": (["kd_ours"], ["ce_hand", "teacher"], 1.05, "ours, live teacher / (hand CE step + teacher forward)"),
    "cached": (["cached_ours"], ["ce_lightning"], 1.02, "ours, cached teacher / bare Lightning CE"),
    "cached_hand": (["cached_ours"], ["ce_hand"], 1.02, "ours, cached teacher / hand CE step"),
    "hand_kd": (["kd_ours"], ["kd_hand"], None, "ours, live / hand KD loop"),
    "bare_kd": (["kd_ours"], ["kd_lightning"], None, "ours, live / bare Lightning KD"),
    "torchdistill": (["kd_ours"], ["kd_torchdistill"], None, "ours, live / torchdistill's loss in a plain loop"),
    "supervised": (["ce_ours"], ["ce_lightning"], None, "ours, CE alone / bare Lightning CE"),
    "torchdistill_live": (
        ["kd_torchdistill"],
        ["ce_hand", "teacher"],
        None,
        "torchdistill's loss / (hand CE step + teacher forward)",
    ),
}
NAMES = {
    "ce_hand": "CE, hand-written loop",
    "ce_lightning": "CE, bare Lightning",
    "ce_ours": "CE, ours (Supervised)",
    "cached_ours": "KD, ours, cached teacher",
    "kd_hand": "KD, hand-written loop",
    "kd_torchdistill": "KD, torchdistill's loss, plain loop",
    "kd_lightning": "KD, bare Lightning",
    "kd_ours": "KD, ours, live teacher",
}


def summary(times: dict[str, list[Times]]) -> dict[str, dict[str, float]]:
    """Return the median CPU and wall time of a step, and the CPU time's quartiles, in milliseconds."""
    found = {}
    for name, steps in times.items():
        cpu, wall = (1e3 * np.array([getattr(step, kind) for step in steps]) for kind in ("cpu_s", "wall_s"))
        low, mid, high = np.quantile(cpu, [0.25, 0.5, 0.75])
        found[name] = {
            "cpu_ms": float(mid),
            "cpu_ms_q25": float(low),
            "cpu_ms_q75": float(high),
            "cpu_ms_mean": float(cpu.mean()),
            "wall_ms": float(np.median(wall)),
        }
    return found


def ratios(times: dict[str, list[Times]]) -> dict[str, dict[str, Any]]:
    """Return the median over rounds of each ratio of CPU times, with a bootstrap interval of 95 %."""
    cpu = {name: np.array([step.cpu_s for step in steps]) for name, steps in times.items()}
    cpu["teacher"] = next(steps for name, steps in cpu.items() if name.startswith("teacher "))
    found = {}
    for key, (above, below, limit, says) in RATIOS.items():
        if not all(name in cpu for name in above + below):
            continue
        over, under = (np.sum([cpu[name] for name in names], axis=0) for names in (above, below))
        low, high = _interval(over / under)
        value = float(np.median(over / under))
        found[key] = {
            "says": says,
            "value": value,
            "low": low,
            "high": high,
            "of_least": float(over.min() / under.min()),
            "of_medians": float(np.median(over) / sum(np.median(cpu[name]) for name in below)),
            "extra_us": float(np.median(over - under) * 1e6),
            "limit": limit,
            "holds": None if limit is None else value <= limit,
        }
    return found


def _interval(values: np.ndarray, *, draws: int = 2000) -> tuple[float, float]:
    chosen = np.random.default_rng(0).choice(values, size=(draws, len(values)))
    low, high = np.quantile(np.median(chosen, axis=1), [0.025, 0.975])
    return float(low), float(high)


def name_of(key: str) -> str:
    return NAMES.get(key, "teacher forward alone")


def markdown(results: dict[str, Any]) -> str:
    """Return the two tables: steps, then ratios, one column a pair."""
    pairs = results["pairs"]
    about = results["machine"]
    noisy = (
        " **Noisy: more was running than there are cores; run again on a quiet machine.**" if results["noisy"] else ""
    )
    rounds = ", ".join(f"{name}: {pair['rounds']}" for name, pair in pairs.items())
    heads = "| " + " | ".join(f"{name}, batch {pair['batch']}" for name, pair in pairs.items()) + " |"
    lines = [
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} thread, torch {about['torch']}, Lightning "
        f"{about['lightning']}, torchdistill {about['torchdistill']}; rounds: {rounds}; load average at most "
        f"{max(pair['load_average'] for pair in pairs.values()):.1f}.{noisy}",
        "",
        f"| median CPU ms a step {heads}",
        f"|---|{'---:|' * len(pairs)}",
    ]
    modes = [pair["teacher_mode"] for pair in pairs.values()]
    lines.append(f"| teacher's cheapest mode | {' | '.join(modes)} |")
    alone = [_ms(pair["steps"][f"teacher {mode}"]) for mode, pair in zip(modes, pairs.values(), strict=True)]
    lines.append(f"| {name_of('teacher')} | {' | '.join(alone)} |")
    for key, says in NAMES.items():
        if any(key in pair["steps"] for pair in pairs.values()):
            lines.append(f"| {says} | {' | '.join(_ms(pair['steps'].get(key)) for pair in pairs.values())} |")
    lines += ["", f"| ratio (limit) {heads}", f"|---|{'---:|' * len(pairs)}"]
    for key, (_, _, limit, says) in RATIOS.items():
        cells = [_ratio(pair["ratios"].get(key), name) for name, pair in pairs.items()]
        lines.append(f"| {says}{f' (<= {limit})' if limit else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(step: dict[str, float] | None) -> str:
    if step is None:
        return ""
    return f"{step['cpu_ms']:.1f}" if step["cpu_ms"] >= 10 else f"{step['cpu_ms']:.3f}"


def _ratio(found: dict[str, Any] | None, pair: str) -> str:
    if found is None:
        return ""
    if pair == "tiny mlp":  # a ratio of nearly nothing says nothing: the difference does
        return f"{found['extra_us']:+.0f} µs"
    missed = " (missed)" if found["holds"] is False else ""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{missed}"


def into_readme(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
