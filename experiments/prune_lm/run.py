"""Prune a small language model: at once by four methods, and to smaller nets that learn from the dense one.

    python experiments/prune_lm/run.py

Writes results.json beside this file after every measurement, then the tables of README.md and the figure. Started again
it goes on with what is missing; with --minutes it stops in between (exit code 75: not done yet). Trained dense nets are
kept in --work.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import setting  # noqa: E402
from arms import CALIBRATED, ESSENTIAL, METHODS, PATTERNS, SMALL, dense_net, measured, one_shot, smaller  # noqa: E402
from summary import draw, tables, write_tables  # noqa: E402

UNFINISHED = 75


class _TimeIsUpError(Exception):
    """The minutes are over."""


class Study:
    """What is done and what is missing."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path, self.work, self.seeds = HERE / "results.json", args.work, range(args.seeds)
        self.calibrations = range(args.calibrations)
        self.until = time.monotonic() + 60.0 * args.minutes
        self.results: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        names = ("DENSE_STEPS", "DENSE_LR", "RETRAIN_STEPS", "RETRAIN_LR", "BATCH", "CALIBRATION_WINDOWS")
        self.results["setting"] = {name.lower(): getattr(setting, name) for name in names}
        self.data = setting.read()

    def run(self) -> None:
        """Do everything that is missing, what matters most first."""
        for seed in self.seeds:
            self.pruned_at_once(seed)
            for arm in ESSENTIAL:
                self.made_smaller(arm, seed)
        for arm in SMALL:
            for seed in self.seeds:
                self.made_smaller(arm, seed)

    def pruned_at_once(self, seed: int) -> None:
        dense = self.dense(seed)
        for pattern in PATTERNS:
            for method in METHODS:
                for place in self.calibrations if method in CALIBRATED else range(1):
                    key = ("one_shot", pattern, method, f"{seed}.{place}")
                    self.do(key, one_shot, dense, self.data, method=method, pattern=pattern, calibration_seed=place)

    def made_smaller(self, arm: str, seed: int) -> None:
        self.do(("smaller", arm, str(seed)), smaller, self.dense(seed), self.data, arm=arm, seed=seed)

    def dense(self, seed: int) -> nn.Module:
        file = self.work / f"dense_{seed}.pt"
        model = setting.net(self.data, seed)
        if file.exists() and str(seed) in self.results.get("dense", {}):
            model.load_state_dict(torch.load(file, weights_only=True))
            return model.eval()
        self.check_time()
        model, seconds = dense_net(self.data, seed)
        self.work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        row = {"parameters": setting.parameters(model), "cpu_s": round(seconds, 1), **measured(model, self.data)}
        self.keep(("dense", str(seed)), row)
        return model

    def do(self, key: tuple[str, ...], work: Any, *args: Any, **kwargs: Any) -> None:
        place = self.results
        for part in key[:-1]:
            place = place.setdefault(part, {})
        if key[-1] not in place:
            self.check_time()
            self.keep(key, work(*args, **kwargs))

    def keep(self, key: tuple[str, ...], row: dict[str, Any]) -> None:
        place = self.results
        for part in key[:-1]:
            place = place.setdefault(part, {})
        place[key[-1]] = row
        self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        print(" / ".join(key), row, flush=True)

    def check_time(self) -> None:
        if time.monotonic() > self.until:
            raise _TimeIsUpError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="dense nets")
    parser.add_argument("--calibrations", type=int, default=1, help="draws of calibration text for each net")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after this time")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/lightning_opt/prune_lm")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study, code = Study(args), 0
    try:
        study.run()
    except _TimeIsUpError:
        code = UNFINISHED
    write_tables(HERE / "README.md", tables(study.results))
    draw(study.results, HERE / "figures" / "prune_lm.png")
    return code


if __name__ == "__main__":
    sys.exit(main())
