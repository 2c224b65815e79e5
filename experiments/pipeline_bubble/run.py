"""Measure the bubbles of torch's pipeline schedules, and simulate pipelines that are larger than this machine.

    python experiments/pipeline_bubble/run.py                     # everything, about 4 minutes
    python experiments/pipeline_bubble/run.py --parts simulated   # from the operations in results.json; no timing

Prints tables and writes results.json, figures/ and the tables in README.md.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: every process shall have one thread

import argparse
import json
import platform
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent / "distill_speed")]

import figure  # noqa: E402
import large  # noqa: E402
from bubbles import LIMIT, compare, on_the_clock, times_of  # noqa: E402
from measure import TOKENS, Setting, Trace, host_seconds, link, trace  # noqa: E402
from orders import SCHEDULES, is_single  # noqa: E402
from table import into_readme, markdown  # noqa: E402

PARTS = ("measured", "simulated")
CASES = {2: 8, 4: 8}  # ranks: micro-batches


def measured(setting: Setting, results: dict[str, Any], names: list[str], path: Path) -> None:
    """Trace each schedule on 2 and on 4 ranks; on 2 also with both at once, on the clock."""
    between, size = link(setting.message_bytes), setting.message_bytes
    results["link"] = {"latency_us": between.latency_s * 1e6, "gb_per_s": between.bytes_per_s / 1e9}
    results["host_us_per_block"] = {kind: 1e6 * s for kind, s in host_seconds().items()}
    results["setting"] = {"blocks": setting.blocks, "dim": setting.dim, "tokens": setting.samples * TOKENS}
    results["setting"] |= {"steps": setting.steps * setting.repeats}
    for ranks, micro_batches in CASES.items():
        for name in names:
            case: dict[str, Any] = {"ranks": ranks, "micro_batches": micro_batches}
            before = os.getloadavg()[0]
            traced = trace(name, setting=setting, alone=True, **case)
            found = compare(name, traced, link=between, message_bytes=size, **case)
            found |= _blocks(traced, name, ranks, setting)
            if ranks <= len(os.sched_getaffinity(0)):
                found["on_the_clock"] = on_the_clock(trace(name, setting=setting, alone=False, **case))
            found["load_average"] = round(max(before, os.getloadavg()[0]), 2)
            results.setdefault("bubbles", {})[f"{name}, {ranks} ranks"] = found
            path.write_text(json.dumps(results) + "\n", encoding="utf-8")
            print(f"{name}, {ranks} ranks: {found['replayed']:.3f}, in theory {found['theory']:.3f}", flush=True)


def _blocks(traced: Trace, name: str, ranks: int, setting: Setting) -> dict[str, Any]:
    """Return the seconds of each kind of operation with the number of blocks in it, for the larger pipelines."""
    stages = ranks if is_single(name) else 2 * ranks
    # The first stage does its whole backward as "W".
    inner = {kind: median([t for s, t in by.items() if s or kind in "FB"]) for kind, by in times_of(traced).items()}
    return {"blocks_per_stage": setting.blocks // stages, "inner_s": inner}


def per_block(results: dict[str, Any]) -> dict[str, Any]:
    """Fit seconds = operation + blocks x block over all chunks that were traced."""
    pairs: dict[str, list[tuple[int, float]]] = {}
    for found in results["bubbles"].values():
        for kind, seconds in found["inner_s"].items():
            pairs.setdefault(kind, []).append((found["blocks_per_stage"], seconds))
    lines = {kind: _line(values) for kind, values in pairs.items()}
    return {
        "dim": results["setting"]["dim"],
        "tokens": results["setting"]["tokens"],
        "block_s": {kind: slope for kind, (_, slope) in lines.items()},
        "operation_s": max(0.0, median([start for start, _ in lines.values()])),
        "host_s": {kind: us * 1e-6 for kind, us in results["host_us_per_block"].items()},
    }


def _line(values: list[tuple[int, float]]) -> tuple[float, float]:
    """Return start and slope of the least-squares line; through zero where there is one number of blocks alone."""
    if len({blocks for blocks, _ in values}) == 1:
        return 0.0, median([seconds / blocks for blocks, seconds in values])
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean()), float(slope)


def simulated(results: dict[str, Any]) -> None:
    """Go through all sizes on three machines."""
    costs = per_block(results)
    fast = large.accelerators(costs)
    machines = (large.cores(costs), fast, large.with_slower_links(fast))
    points = large.sweep(machines)
    results["costs"] = costs
    results["host_margin"] = large.faster_until_the_host_is_late(fast)
    results["simulated"] = {
        machine.name: {
            "says": machine.says,
            "memory_bytes": machine.memory_bytes,
            "points": points[machine.name],
            "breaks": [large.breaks(points[machine.name], name) for name in (large.ALONE, *SCHEDULES)],
        }
        for machine in machines
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--steps", type=int, default=Setting.steps, help="that are measured, five times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "measured" in arguments.parts:
        results["machine"], results["limit"] = machine(), LIMIT
        measured(Setting(steps=arguments.steps), results, arguments.schedules, path)
    if "simulated" in arguments.parts:
        simulated(results)
    path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    figure.draw(results, HERE / "figures")
    text = markdown(results)
    print(text)
    into_readme(HERE / "README.md", text)
    off = [abs(found["off"]) for found in results["bubbles"].values()]
    return 0 if max(off) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
