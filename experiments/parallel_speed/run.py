"""Ours against hand-written torch with the same parallelism, and one process against two.

    python experiments/parallel_speed/run.py                          # adds a piece of about 4 minutes
    python experiments/parallel_speed/run.py --cases ddp --rounds 30   # some, longer
    python experiments/parallel_speed/run.py --fresh                  # forgets the pieces that are there
    python experiments/parallel_speed/run.py --gpu                    # FSDP2 and compile on accelerators (gpu.py)

Pieces add up in results.json; those from a loaded machine are kept apart. Prints a table and writes it into README.md.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: every process shall have one thread

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

from contenders import race  # noqa: E402
from setting import BATCH, DEPTH, DIM, LENGTH  # noqa: E402

MARKS = ("<!-- table -->", "<!-- end of table -->")
LIMITS = {"ddp": 0.97, "fsdp2": 0.97, "pipeline": 0.97, "weak scaling": 0.85}


def piece(case: str, *, rounds: int, block: int) -> dict[str, Any]:
    """Race once and keep each round's slowest rank."""
    before = os.getloadavg()[0]
    ranks = race(case, rounds=rounds, block=block)
    load = max(before, os.getloadavg()[0])
    # Two processes are the load of their own measurement.
    return {
        "load_average": round(load, 2),
        "noisy": load > (os.cpu_count() or 1) + 0.5,
        "wall_s": {name: _slowest(ranks, name, 0) for name in ranks[0]},
        "cpu_s": {name: _slowest(ranks, name, 1) for name in ranks[0]},
    }


def _slowest(ranks: list[dict[str, list[list[float]]]], name: str, kind: int) -> list[float]:
    """Return of each round the slower rank; ranks that train alone are averaged."""
    both = np.array([[turn[kind] for turn in rank[name]] for rank in ranks])
    return list((both.mean(0) if name == "alone" else both.max(0)).tolist())


def summary(case: str, pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratio over all quiet pieces, or over all where none is quiet."""
    quiet = [one for one in pieces if not one["noisy"]]
    used = quiet or pieces
    above, below = ("alone", "two") if case == "weak scaling" else ("by hand", "ours")
    found: dict[str, Any] = {"quiet": bool(quiet), "load_average": max(one["load_average"] for one in used)}
    for kind in ("wall_s", "cpu_s"):
        over, under = (np.concatenate([one[kind][name] for one in used]) for name in (above, below))
        ratio, draw = over / under, np.random.default_rng(0)
        low, high = np.quantile(np.median(draw.choice(ratio, size=(2000, len(ratio))), axis=1), [0.025, 0.975])
        found[kind] = {
            "ratio": float(np.median(ratio)),
            "of_medians": float(np.median(over) / np.median(under)),
            "low": float(low),
            "high": float(high),
            "rounds": len(ratio),
            above: float(np.median(over)) * 1e3,
            below: float(np.median(under)) * 1e3,
        }
    return found | {"limit": LIMITS[case], "holds": found["wall_s"]["ratio"] >= LIMITS[case]}


def markdown(results: dict[str, Any]) -> str:
    """Return the ratios with the times below them."""
    about = results["machine"]
    lines = [
        f"{about['cpu']}, {about['cores']} cores, 1 thread a process, torch {about['torch']}; {DEPTH} blocks "
        f"of width {DIM}, {LENGTH} tokens, {BATCH} sequences a process.",
        "",
        "| two processes | limit | on the clock | step, ms | on the processor | rounds | load |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for case, found in results["summary"].items():
        wall, cpu = found["wall_s"], found["cpu_s"]
        names = [name for name in ("by hand", "ours", "alone", "two") if name in wall]
        missed = "" if found["holds"] else " (missed)" if found["quiet"] else " (loaded machine)"
        lines.append(
            f"| {case} | {found['limit']} | **{wall['ratio']:.3f}** [{wall['low']:.3f}, {wall['high']:.3f}]{missed} | "
            f"{', '.join(f'{name} {wall[name]:.0f}' for name in names)} | {cpu['ratio']:.3f} | {wall['rounds']} | "
            f"{found['load_average']} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__}


def into_readme(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    readme.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--block", type=int, default=5, help="steps that a contender does in its turn")
    parser.add_argument("--fresh", action="store_true", help="forget the pieces of these cases that are there")
    parser.add_argument("--gpu", action="store_true", help="measure accelerators instead")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning_opt"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if arguments.gpu:
        import gpu

        return gpu.main(HERE / "results_gpu.json")
    path = HERE / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"pieces": {}}
    results["machine"] = machine()
    for case in arguments.cases:
        pieces = [] if arguments.fresh else results["pieces"].get(case, [])
        results["pieces"][case] = [*pieces, piece(case, rounds=arguments.rounds, block=arguments.block)]
        results["summary"] = {
            name: summary(name, results["pieces"][name]) for name in LIMITS if name in results["pieces"]
        }
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        found = results["summary"][case]["wall_s"]
        print(f"{case}: {found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]", flush=True)
    text = markdown(results)
    print(text)
    into_readme(HERE / "README.md", text)
    return 0 if all(found["holds"] for found in results["summary"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
