"""Measure how much of the gap between a student and its teacher distillation closes, on small real data.

    python experiments/distill_quality/run.py --peer-python PEER/bin/python

Writes results.json beside this file after every seed, and figures at the end. Started again, it goes on where it was;
--fresh begins anew.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from ours import Data, arms_of, read  # noqa: E402
from setting import PAIRS, Loss, Pair, accuracy, fresh, parameters, train  # noqa: E402
from summary import draw, mean_closure, summarise, table, write_table  # noqa: E402

PEERS = tuple(f"torchdistill_{loss}{form}" for form in ("", "_versions") for loss in ("kd", "logit_std"))


def one(pair: Pair, data: Data, seed: int, loss: Loss, form: str, told: str | None) -> dict[str, float]:
    """Train one student and measure it."""
    student = fresh(pair.student, seed)
    seconds = train(
        student,
        data.seen[form],
        data.labels,
        loss,
        answers=None if told is None else data.told[told],
        batch=pair.batch,
        epochs=pair.epochs,
        lr=pair.lr,
        seed=seed,
    )
    return {"val": accuracy(student, *data.val), "test": accuracy(student, *data.test), "cpu_s": round(seconds, 2)}


def run_pair(pair: Pair, args: argparse.Namespace, entry: dict[str, Any], save: Any) -> None:
    """Train every arm with every seed that is still missing."""
    data = read(pair, args.text_teacher)
    entry["teacher"] = data.teacher
    entry["student"] = {"parameters": parameters(pair.student())}
    entry["samples"] = {"train": len(data.labels), "val": len(data.val[1]), "test": len(data.test[1])}
    entry["steps"] = pair.epochs * (len(data.labels) // pair.batch)
    print(f"{pair.name}: teacher {data.teacher}", flush=True)
    arms, seeds = entry.setdefault("arms", {}), args.seeds or pair.seeds
    for seed in range(seeds):
        for arm, (make, form, told) in arms_of(pair).items():
            if str(seed) not in arms.setdefault(arm, {}):
                arms[arm][str(seed)] = one(pair, data, seed, make(), form, told)
        words = [f"{arm} {runs[str(seed)]['test']:.2f}" for arm, runs in arms.items() if str(seed) in runs]
        print(f"{pair.name}: seed {seed}: {', '.join(words)}", flush=True)
        if args.peer_python and seed in (2, seeds - 1):
            run_peers(pair, args, data, arms, range(seed + 1))
        save()


def run_peers(pair: Pair, args: argparse.Namespace, data: Data, arms: dict[str, Any], seeds: range) -> None:
    """Run torchdistill's arms for the seeds that lack them, under its own interpreter."""
    missing = [[arm, seed] for arm in PEERS for seed in seeds if str(seed) not in arms.get(arm, {})]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.pt"
        tensors = {name: getattr(data, name) for name in ("labels", "seen", "told", "val", "test")}
        torch.save({"pair": pair.name, "missing": missing, **tensors}, job)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [args.peer_python, str(HERE / "peers.py"), str(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the peer's arms failed:\n{done.stderr}")
    for line in done.stdout.splitlines():
        row = json.loads(line)
        arms.setdefault(row.pop("arm"), {})[str(row.pop("seed"))] = row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seeds", type=int, help="students per arm; none: as many as the pair wants")
    parser.add_argument("--text-teacher", type=Path, help="folder of the fine-tuned MiniLM, for movie_reviews")
    parser.add_argument("--peer-python", help="interpreter with torchdistill (make_peer_env.sh); none: no peer arms")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--redraw", action="store_true", help="train nothing: table and figures from results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"pairs": {}}
    if args.results.exists() and not args.fresh:
        results = json.loads(args.results.read_text())

    def save() -> None:
        results["torch"] = torch.__version__
        for entry in results["pairs"].values():
            if entry.get("arms", {}).get("alone"):
                entry["summary"] = summarise(entry)
        results["mean_closure_percent"] = mean_closure(results)
        args.results.write_text(json.dumps(results, indent=1) + "\n")

    for name in [None] if args.redraw else args.pairs:
        if name is not None:
            run_pair(PAIRS[name], args, results["pairs"].setdefault(name, {}), save)
        save()
        draw(results, args.results.parent / "figures")
        print(table(results), flush=True)
        if args.results.parent == HERE:
            write_table(HERE / "README.md", table(results))


if __name__ == "__main__":
    main()
