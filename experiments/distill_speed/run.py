"""Measure what a teacher costs per training step, live and stored, beside loops written by hand.

    python experiments/distill_speed/run.py            # at most 6 minutes
    python experiments/distill_speed/run.py --quick    # a look, about a minute

Prints a table, writes results.json, figures/step_time.png and the table in README.md.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: every thread shall have one

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent / "loss_parity")]

import lightning  # noqa: E402
from contenders import contenders  # noqa: E402
from figure import draw  # noqa: E402
from pairs import PAIRS, Batches, Pair, cheapest, modes, split  # noqa: E402
from peer import FOLDER, torchdistill_losses  # noqa: E402
from relay import Runner, race, share_one_heap  # noqa: E402
from table import into_readme, markdown, ratios, summary  # noqa: E402

SHARES = {"resnet32x4 -> resnet8x4": 0.5, "resnet56 -> resnet20": 0.22, "text 6x384 -> 3x192": 0.22, "tiny mlp": 0.06}

# The cached teacher's limit is the narrowest, and these steps are the cheap ones.
TURNS = {"ce_hand": 2, "ce_lightning": 2, "ce_ours": 2, "cached_ours": 2}


def measure(pair: Pair, *, seconds: float, peer: ModuleType | None) -> dict[str, Any]:
    """Race all contenders of one pair; return times, ratios and what they were measured with."""
    choices = modes(pair)
    inputs, _ = split(Batches(pair.tensors(), batch=pair.batch).ready[0])
    tiny = pair.name == "tiny mlp"
    mode, least = cheapest(choices, inputs, rounds=200 if tiny else 3)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        bodies = contenders(pair, mode, peer=peer, folder=Path(folder))
        runners = [Runner(name, body, block=pair.block) for name, body in bodies.items()]
        for runner in runners:
            runner.start()
        times = race(runners, turns=TURNS, seconds=seconds, warmup=5 if tiny else 1, at_most=500)
        for runner in runners:
            runner.stop()
    load = max(before, os.getloadavg()[0])
    return {
        "batch": pair.batch,
        "teacher_mode": mode.name,
        "teacher_least_cpu_ms_before": {name: value * 1e3 for name, value in least.items()},
        "rounds": len(times["ce_hand"]),
        "load_average": load,
        "noisy": load > (os.cpu_count() or 1),
        "steps": summary(times),
        "ratios": ratios(times),
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "torchdistill": "1.1.5",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds; the figures in README.md stay as they are")
    parser.add_argument("--seconds", type=float, default=None, help="time for all pairs together, without their set-up")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--peer", type=Path, default=FOLDER, help="folder of torchdistill; filled where it is missing")
    parser.add_argument("--no-peer", action="store_true", help="leave torchdistill's loss out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    one_heap = share_one_heap()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    total = arguments.seconds or (20.0 if arguments.quick else 230.0)
    peer = None if arguments.no_peer else torchdistill_losses(arguments.peer)
    begun, pairs, share = time.perf_counter(), {}, sum(SHARES[name] for name in arguments.pairs)
    for name in arguments.pairs:
        pairs[name] = measure(PAIRS[name], seconds=total * SHARES[name] / share, peer=peer)
        print(f"{name}: {pairs[name]['rounds']} rounds, load {pairs[name]['load_average']:.1f}", flush=True)
    results = {
        "machine": {**machine(), "one_heap": one_heap},
        "quick": arguments.quick,
        "wall_s": round(time.perf_counter() - begun, 1),
        "noisy": any(pair["noisy"] for pair in pairs.values()),
        "pairs": pairs,
    }
    text = markdown(results)
    print(text)
    if arguments.quick or set(pairs) != set(PAIRS):
        return
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    into_readme(HERE / "README.md", text)
    draw(results, HERE / "figures" / "step_time.png")


if __name__ == "__main__":
    main()
