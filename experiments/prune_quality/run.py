"""Measure what pruning costs: accuracy at 90, 95 and 98 % zeros and at half the multiply-accumulates, equal steps.

    python experiments/prune_quality/run.py

Writes results.json beside this file after every net, then the tables of README.md and the figures. Started again it
goes on with what is missing; with --minutes it stops in between (exit code 75: not done yet).
"""

import argparse
import json
import logging
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from arms import RECIPES, Arm, Bench, arms_of, gradual, lightning_as_documented, measures  # noqa: E402
from setting import PAIRS, Data, accuracy, parameters, read  # noqa: E402
from summary import best_recipe, draw, tables, write_tables  # noqa: E402

UNFINISHED = 75
LOOKED_AT, LOOK_SEEDS, LOOK_SPARSITIES = ("digits", "mnist1d"), (100,), (0.98,)


class TimeIsUpError(Exception):
    """The minutes are over."""


class Study:
    """What is done and what is missing."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path, self.args = args.results, args
        self.until = time.monotonic() + 60.0 * args.minutes
        self.results: dict[str, Any] = {"looks": {}, "pairs": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text())
        self.results["torch"] = torch.__version__
        self.data: dict[str, Data] = {}

    def run(self) -> None:
        """Choose the recipe on the validation parts, then run all arms, seed by seed."""
        for seed in LOOK_SEEDS:
            for name in LOOKED_AT:
                self.look(name, seed)
        recipe = self.results["recipe"] = best_recipe(self.results["looks"])
        pairs = [PAIRS[name] for name in self.args.pairs]
        self.bench(
            "digits",
            0,
            {str(amount): partial(lightning_as_documented, amount) for amount in (0.5, 0.9)},
            "as_documented",
        )
        for seeds in (range(min(2, self.args.seeds)), range(2, self.args.seeds)):
            for tier in arms_of(recipe):
                for seed in seeds:
                    for pair in pairs:
                        self.bench(pair.name, seed, tier, "arms")

    def look(self, name: str, seed: int) -> None:
        """Try the recipes."""
        for recipe, how in RECIPES.items():
            for share in LOOK_SPARSITIES:
                place = self.results["looks"].setdefault(name, {}).setdefault(f"{recipe}@{share * 100:.0f}", {})
                if str(seed) not in place:
                    bench = Bench(PAIRS[name], self.of(name), seed, self.args.work)
                    self.check_time()
                    model, _ = gradual(share, bench, **how)
                    place[str(seed)] = round(accuracy(model, bench.data.val), 3)
                    self.save()

    def bench(self, name: str, seed: int, arms: dict[str, Arm], where: str) -> None:
        """Run the arms that are missing for one seed of one pair."""
        entry = self.results["pairs"].setdefault(name, {})
        done = entry.setdefault(where, {})
        missing = {arm: work for arm, work in arms.items() if str(seed) not in done.get(arm, {})}
        if not missing:
            return
        bench = Bench(PAIRS[name], self.of(name), seed, self.args.work)
        entry["samples"] = [len(part[1]) for part in (bench.data.train, bench.data.val, bench.data.test)]
        entry["parameters"] = parameters(bench.new())
        for arm, work in missing.items():
            self.check_time()
            started = time.process_time()
            model, steps = work(bench)
            row = {"val": accuracy(model, bench.data.val), "test": accuracy(model, bench.data.test)}
            row = {part: round(value, 3) for part, value in row.items()}
            row |= {"steps": steps, "cpu_s": round(time.process_time() - started, 1), **measures(model, bench.data)}
            done.setdefault(arm, {})[str(seed)] = row
            print(f"{name} seed {seed} {arm}: {row}", flush=True)
            self.save()

    def of(self, name: str) -> Data:
        if name not in self.data:
            self.data[name] = read(PAIRS[name])
        return self.data[name]

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise TimeIsUpError

    def save(self) -> None:
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seeds", type=int, default=5, help="nets per arm, at most")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after these, to be started again")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache/lightning_opt/prune_quality", help="half-trained nets"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--redraw", action="store_true", help="train nothing: tables and figures from results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    study, status = Study(args), 0
    try:
        if not args.redraw:
            study.run()
    except TimeIsUpError:
        status = UNFINISHED
    study.save()
    if args.results.parent == HERE:
        draw(study.results, HERE / "figures")
        write_tables(HERE / "README.md", tables(study.results))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
