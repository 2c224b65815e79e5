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
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from ours import Data, answers_of, candidates, plain_dkd, plain_kd, read, teachers_of  # noqa: E402
from setting import (  # noqa: E402
    PAIRS,
    Loss,
    Pair,
    accuracy,
    cross_entropy,
    fresh,
    parameters,
    smoothed_cross_entropy,
    train,
)
from summary import draw, mean_closure, summarise, table, write_table  # noqa: E402

PEERS = ("torchdistill_kd", "torchdistill_logit_std")


def one(pair: Pair, data: Data, loss: Loss, seed: int, answers: torch.Tensor | None, part: str) -> dict[str, float]:
    """Train one student and measure it on the validation part, and on the test part if that is asked for."""
    student = fresh(pair.student, seed)
    seconds = train(
        student,
        data.inputs[None],
        data.labels,
        loss,
        answers=answers,
        batch=pair.batch,
        epochs=pair.epochs,
        lr=pair.lr,
        seed=seed,
    )
    got = {"val": accuracy(student, *data.val), "cpu_s": round(seconds, 2)}
    return {**got, "test": accuracy(student, *data.test)} if part == "test" else got


def choose(pair: Pair, data: Data, answers: torch.Tensor, entry: dict[str, Any], save: Any) -> str:
    """Pick the recipe with the best mean accuracy on the validation part, with seeds that are not used again."""
    tried = entry.setdefault("validation", {})
    for name, make in candidates().items():
        if name not in tried:
            tried[name] = [one(pair, data, make(), seed, answers, "val")["val"] for seed in pair.choosing_seeds]
            print(f"{pair.name}: val {name}: {tried[name]}", flush=True)
            save()
    return max(tried, key=lambda name: sum(tried[name]))


def our_arms(recipe: str, answers: torch.Tensor, random: torch.Tensor) -> dict[str, Any]:
    """Name our arms: a loss and the answers that it sees."""
    return {
        "alone": (lambda: cross_entropy, None),
        "label_smoothing": (lambda: smoothed_cross_entropy, None),
        "random_teacher": (plain_kd, random),
        "kd": (plain_kd, answers),
        "dkd": (plain_dkd, answers),
        "ours": (candidates()[recipe], answers),
    }


def run_pair(pair: Pair, args: argparse.Namespace, entry: dict[str, Any], save: Any) -> None:
    data = read(pair)
    started = time.process_time()
    members = teachers_of(pair, data)
    answers = answers_of(members, data.inputs)[None]
    untrained = answers_of([fresh(pair.teacher, 1000)], data.inputs)[None]
    entry["teacher"] = {
        "val": 100.0 * (answers_of(members, data.val[0]).argmax(1) == data.val[1]).double().mean().item(),
        "test": 100.0 * (answers_of(members, data.test[0]).argmax(1) == data.test[1]).double().mean().item(),
        "parameters": sum(parameters(member) for member in members),
        "cpu_s": round(time.process_time() - started, 1),
    }
    entry["student"] = {"parameters": parameters(pair.student())}
    entry["samples"] = {"train": len(data.labels), "val": len(data.val[1]), "test": len(data.test[1])}
    entry["steps"] = pair.epochs * (len(data.labels) // pair.batch)
    entry["choosing_seeds"] = list(pair.choosing_seeds)
    entry["recipe"] = choose(pair, data, answers, entry, save)
    print(f"{pair.name}: teacher {entry['teacher']}, recipe {entry['recipe']}", flush=True)
    arms = entry.setdefault("arms", {})
    for seed in range(args.seeds):
        for arm, (make, told) in our_arms(entry["recipe"], answers, untrained).items():
            if str(seed) not in arms.setdefault(arm, {}):
                arms[arm][str(seed)] = one(pair, data, make(), seed, told, "test")
        print(
            f"{pair.name}: seed {seed}: "
            + ", ".join(f"{a} {arms[a][str(seed)]['test']:.2f}" for a in arms if str(seed) in arms[a]),
            flush=True,
        )
        if (seed % 3 == 0 or seed == args.seeds - 1) and args.peer_python:
            run_peers(pair, args, data, answers, arms, range(seed + 1))
        save()


def run_peers(
    pair: Pair, args: argparse.Namespace, data: Data, answers: torch.Tensor, arms: dict[str, Any], seeds: range
) -> None:
    """Run torchdistill's arms for the seeds that lack them, under its own interpreter."""
    missing = [seed for seed in seeds if any(str(seed) not in arms.get(arm, {}) for arm in PEERS)]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.pt"
        tensors = {"inputs": data.inputs[None], "labels": data.labels, "answers": answers}
        torch.save({"pair": pair.name, "seeds": missing, "val": data.val, "test": data.test, **tensors}, job)
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
    parser.add_argument("--seeds", type=int, default=10, help="students per arm")
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
