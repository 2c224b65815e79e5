"""Measure what pruning costs while a model trains: masks per step, updates of the masks, idle callbacks.

    python experiments/prune_overhead/run.py                      # everything, about 8 minutes on a quiet machine
    python experiments/prune_overhead/run.py --parts core         # some; the other figures in results.json stay

Prints a table and writes results.json and the table in README.md.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: every thread shall have one

import argparse
import json
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent / "distill_speed")]

from nets import NETS, prunable  # noqa: E402
from relay import share_one_heap  # noqa: E402

MARKS = ("<!-- table -->", "<!-- end of table -->")
LIMITS = {
    "step, masks": ("step", 1.03),
    "step, masks on gradients too": ("step", None),
    "step, nothing masked yet": ("step", 1.01),
    "step, torch.nn.utils.prune": ("step", None),
    "update, GlobalAllocation": ("step", 0.2),
    "update, ERK": ("step", 0.2),
    "update, LAMP": ("step", None),
    "update, torch.nn.utils.prune global": ("step", None),
    "fit, Prune waiting": ("fit, no callback", 1.01),
    "fit, Prune masking": ("fit, no callback", 1.03),
    "fit, Lightning's ModelPruning masking": ("fit, no callback", None),
}


def measure(part: str, name: str, *, seconds: float) -> dict[str, Any]:
    """Time one part for one network."""
    before = os.getloadavg()[0]
    if part == "core":
        from core import race, steps_of

        times = race(steps_of(NETS[name]), seconds=seconds)
    else:
        from fits import fits_of

        tiny = name == "tiny mlp"
        times = fits_of(NETS[name], seconds=seconds / 4 if tiny else seconds, block=50 if tiny else 1, warmup=3)
    load = max(before, os.getloadavg()[0])
    return {
        "rounds": len(next(iter(times.values()))),
        "load_average": round(load, 2),
        "noisy": load > (os.cpu_count() or 1),
        "cpu_ms": {call: float(np.nanmedian(values)) * 1e3 for call, values in times.items()},
        "ratios": {call: _ratio(times, call) for call in times if call in LIMITS},
    }


def _ratio(times: dict[str, list[float]], call: str) -> dict[str, Any]:
    """Return the median over rounds of this call by the bare step, with a bootstrap interval of 95 %."""
    base, limit = LIMITS[call]
    above, below = np.array(times[call]), np.array(times[base])
    came = ~np.isnan(above)
    above, below = above[came], below[came]
    values, draw = above / below, np.random.default_rng(0)
    medians = np.median(draw.choice(values, size=(2000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    added = float(np.median(above - below)) * 1e6
    return {
        "median": float(np.median(values)),
        "low": float(low),
        "high": float(high),
        "limit": limit,
        "added_us": added,
    }


def markdown(results: dict[str, Any]) -> str:
    """Write times and ratios as one table for each part."""
    machine = results["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, 1 thread, torch {machine['torch']}.", ""]
    for part, unordered in results["parts"].items():
        nets = {name: unordered[name] for name in NETS if name in unordered}
        rounds = [f"{name}: {found['rounds']} rounds, load {found['load_average']}" for name, found in nets.items()]
        lines += [f"| {part} | " + " | ".join(nets) + " |", "|---" * (len(nets) + 1) + "|"]
        for call in next(iter(nets.values()))["cpu_ms"]:
            limit = LIMITS.get(call, (None, None))[1]
            title = call if limit is None else f"{call} (<= {limit})"
            lines.append(f"| {title} | " + " | ".join(_cell(found, call) for found in nets.values()) + " |")
        lines += ["", "; ".join(rounds) + ".", ""]
    return "\n".join(lines)


def _cell(found: dict[str, Any], call: str) -> str:
    time_ms, ratio = found["cpu_ms"][call], found["ratios"].get(call)
    if ratio is None:
        return f"{time_ms:.1f} ms" if time_ms >= 10 else f"{1e3 * time_ms:.0f} us"
    if found["cpu_ms"][LIMITS[call][0]] < 10:
        return f"{ratio['added_us']:+.0f} us"
    return f"**{ratio['median']:.3f}** [{ratio['low']:.3f}, {ratio['high']:.3f}], {time_ms:.0f} ms"


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["core", "fits"], default=["core", "fits"])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--seconds", type=float, default=100.0, help="for each part and network, without its set-up")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the table of results.json anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    one_heap, path = share_one_heap(), HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    results["machine"] = {**machine(), "one_heap": one_heap}
    results["weights"] = {name: sum(p.numel() for p in prunable(net.make()).values()) for name, net in NETS.items()}
    for part in [] if arguments.table else arguments.parts:
        for name in arguments.nets:
            if (part, name) != ("core", "tiny mlp"):
                results["parts"].setdefault(part, {})[name] = measure(part, name, seconds=arguments.seconds)
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    print(text)
    readme = HERE / "README.md"
    if readme.exists():
        before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        readme.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
