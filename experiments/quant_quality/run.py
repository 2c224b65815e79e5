"""Measure what quantization costs in quality, and what training with it gives back, at equal steps, beside peers.

    python experiments/quant_quality/run.py

Writes results.json beside this file after every net, then the tables of README.md and the figure. Started again it
goes on with what is missing; with --minutes it stops in between (exit code 75: not done yet).
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import peers  # noqa: E402
from arms import FACTORS, Arm, Bench, before, control, peers_of  # noqa: E402
from ours import ours_of  # noqa: E402
from setting import PAIRS, Data, Pair, parameters, quality, read  # noqa: E402
from summary import draw, tables, write_tables  # noqa: E402

UNFINISHED = 75
LOOK_SEEDS = (100,)


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
        """Choose the learning rate on the validation parts, then run all arms, seed by seed."""
        pairs = [PAIRS[name] for name in self.args.pairs]
        for pair in pairs:
            self.look(pair)
        for seeds in (range(min(2, self.args.seeds)), range(2, self.args.seeds)):
            for tier in range(1 + len(ours_of())):
                for seed in seeds:
                    for pair in [pair for pair in pairs if seed < pair.seeds]:
                        self.bench(pair, seed, tiers_of(pair)[tier])

    def look(self, pair: Pair) -> None:
        """Try the learning rates of the extra steps on the control."""
        place = self.results["looks"].setdefault(pair.name, {})
        for factor in FACTORS:
            row = place.setdefault(str(factor), {})
            for seed in LOOK_SEEDS:
                if str(seed) not in row:
                    self.check_time()
                    bench = Bench(pair, self.of(pair.name), seed, self.args.work, factor)
                    row[str(seed)] = quality(bench.control(), bench.data, "val")
                    print(f"look {pair.name} {factor} seed {seed}: {row[str(seed)]}", flush=True)
                    self.save()

    def factor(self, pair: Pair) -> float:
        """Return the learning rate with the best mean accuracy of the control on the validation part."""
        rows = self.results["looks"][pair.name]
        return max(FACTORS, key=lambda factor: sum(row["acc"] for row in rows[str(factor)].values()))

    def bench(self, pair: Pair, seed: int, arms: dict[str, Arm]) -> None:
        """Run the arms that are missing for one seed of one pair."""
        entry = self.results["pairs"].setdefault(pair.name, {})
        done = entry.setdefault("arms", {})
        chosen = self.args.only or [""]
        missing = {
            arm: work
            for arm, work in arms.items()
            if str(seed) not in done.get(arm, {}) and (arm in ("float", "fp32") or any(part in arm for part in chosen))
        }
        if not missing:
            return
        bench = Bench(pair, self.of(pair.name), seed, self.args.work, self.factor(pair))
        entry["samples"] = [len(part[1]) for part in (bench.data.train, bench.data.val, bench.data.test)]
        entry["parameters"] = parameters(bench.float_net())
        for arm, work in missing.items():
            self.check_time()
            started = time.process_time()
            model = work(bench)
            row: dict[str, Any] = {"test": quality(model, bench.data, "test"), "val": quality(model, bench.data, "val")}
            row["cpu_s"] = round(time.process_time() - started, 1)
            done.setdefault(arm, {})[str(seed)] = row
            print(f"{pair.name} seed {seed} {arm}: {row}", flush=True)
            self.save()

    def of(self, name: str) -> Data:
        if name not in self.data:
            self.data[name] = read(PAIRS[name])
        return self.data[name]

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise TimeIsUpError

    def save(self) -> None:
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.results, indent=1) + "\n")
        draft.replace(self.path)


def tiers_of(pair: Pair) -> list[dict[str, Arm]]:
    """Name the arms of a pair, first those that others are beside."""
    first, second, *others = ours_of()
    return [{"float": before, "fp32": control, **first}, second, peers_of(pair), *others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seeds", type=int, default=5, help="nets per arm, at most")
    parser.add_argument("--only", nargs="+", help="arms whose names have one of these in them, besides the controls")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after these, to be started again")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache/lightning_opt/quant_quality", help="float nets"
    )
    parser.add_argument("--peer-path", type=Path, default=peers.FOLDER, help="folder of the peers; filled if missing")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--redraw", action="store_true", help="train nothing: tables and figure from results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    study, status = Study(args), 0
    try:
        if not args.redraw:
            peers.install(args.peer_path)
            study.run()
    except TimeIsUpError:
        status = UNFINISHED
    study.save()
    print(tables(study.results))
    if args.results.parent == HERE:
        draw(study.results, HERE / "figures")
        write_tables(HERE / "README.md", tables(study.results))
    raise SystemExit(status)


if __name__ == "__main__":
    main()
