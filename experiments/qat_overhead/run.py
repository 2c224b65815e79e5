"""Measure what quantization-aware training costs a step: rounding, observing, learned steps, callback; compiled too.

    python experiments/qat_overhead/run.py                          # everything, about 15 minutes on a quiet machine
    python experiments/qat_overhead/run.py --parts core             # some; the other figures in results.json stay

Prints tables and writes results.json and the tables in README.md.
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
sys.path.append(str(HERE.parent / "quant_quality"))

import peers  # noqa: E402
from nets import NETS  # noqa: E402
from relay import share_one_heap  # noqa: E402

MARKS = ("<!-- table -->", "<!-- end of table -->")
PARTS = ("core", "fits", "compiled", "peers")
LIMIT = 1.35  # of a step that rounds, eager
LIMITED = ("rounding", "rounding and observing", "fit, Quantize rounding", "fit, Quantize rounding and observing")


def measure(part: str, name: str, *, seconds: float) -> dict[str, Any]:
    """Time one part for one network."""
    before = os.getloadavg()[0]
    if part == "fits":
        from fits import fits_of

        times = fits_of(NETS[name], seconds=seconds)
    else:
        import core

        makers = {"core": core.steps_of, "compiled": core.compiled_of, "peers": core.peers_of}
        times = core.race(makers[part](NETS[name]), seconds=seconds)
    load = max(before, os.getloadavg()[0])
    base = next(iter(times))
    return {
        "rounds": len(times[base]),
        "load_average": round(load, 2),
        "noisy": load > (os.cpu_count() or 1),
        "cpu_ms": {call: float(np.median(values)) * 1e3 for call, values in times.items()},
        "ratios": {call: _ratio(times[call], times[base]) for call in times if call != base},
    }


def _ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Return the median over rounds of this call by the bare step, with a bootstrap interval of 95 %."""
    values, draw = np.array(above) / np.array(below), np.random.default_rng(0)
    medians = np.median(draw.choice(values, size=(2000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def markdown(results: dict[str, Any]) -> str:
    """Write times and ratios as one table for each part."""
    machine = results["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, 1 thread, torch {machine['torch']}.", ""]
    for part in (part for part in PARTS if part in results["parts"]):
        unordered = results["parts"][part]
        nets = {name: unordered[name] for name in NETS if name in unordered}
        rounds = [f"{name}: {found['rounds']} rounds, load {found['load_average']}" for name, found in nets.items()]
        lines += [f"| {part} | " + " | ".join(nets) + " |", "|---" * (len(nets) + 1) + "|"]
        for call in dict.fromkeys(call for found in nets.values() for call in found["cpu_ms"]):
            title = f"{call} (<= {LIMIT})" if call in LIMITED and part in ("core", "fits") else call
            lines.append(f"| {title} | " + " | ".join(_cell(found, call) for found in nets.values()) + " |")
        lines += ["", "; ".join(rounds) + ".", ""]
    return "\n".join(lines)


def _cell(found: dict[str, Any], call: str) -> str:
    if call not in found["cpu_ms"]:
        return "-"
    time_ms, ratio = found["cpu_ms"][call], found["ratios"].get(call)
    if ratio is None:
        return f"{time_ms:.1f} ms"
    return f"**{ratio['median']:.3f}** [{ratio['low']:.3f}, {ratio['high']:.3f}], {time_ms:.0f} ms"


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--nets", nargs="+", default=list(NETS), help="names that begin with one of these")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each part and network, without its set-up")
    parser.add_argument("--peer-path", type=Path, default=peers.FOLDER, help="folder of the peers; filled if missing")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the table of results.json anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if "peers" in arguments.parts and not arguments.table:
        peers.install(arguments.peer_path)
    one_heap, path = share_one_heap(), HERE / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    results["machine"] = {**machine(), "one_heap": one_heap}
    for part in [] if arguments.table else arguments.parts:
        for name in [name for name in NETS if any(name.startswith(start) for start in arguments.nets)]:
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
