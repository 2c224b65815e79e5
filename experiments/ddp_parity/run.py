"""Two processes with batch B against one process with batch 2B: the same loss curve.

    python experiments/ddp_parity/run.py

Prints one line of figures and writes results.json beside this file. Exit code 1 above the bound.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOUND = 1e-5
# No batch norm: its statistics are those of a process's own share of the batch.
JOB = [
    "+experiment=distill",
    "data=digits",
    "model=mlp",
    "model.input_shape=[1,8,8]",
    "model.hidden=[32]",
    "loss=[kd,fitnets]",
    "~loss.terms.fitnets.loss.layers",
    "+loss.terms.fitnets.loss.layers={layers.0: layers.0}",
    "teacher.model._target_=lightning_opt.models.MLP",
    "teacher.model.input_shape=[1,8,8]",
    "teacher.model.hidden=[128]",
    "~teacher.train.data",
    "teacher.cache=null",
    "baseline=false",
    "benchmark=false",
    "export=false",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=10",
    "trainer.log_every_n_steps=1",
]


def losses(folder: Path, name: str, cache: Path, overrides: list[str]) -> dict[int, float]:
    """Run once and return the training loss by step."""
    command = [sys.executable, str(ROOT / "train.py"), *JOB, *overrides, f"run_dir={folder / name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(cache)}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    with (folder / name / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}


def study(folder: Path) -> dict:
    cache = folder / "cache"
    one = losses(folder, "one", cache, ["data.batch_size=64"])
    two = losses(folder, "two", cache, ["data.batch_size=32", "trainer.devices=2", "strategy=ddp"])
    control = losses(folder, "control", cache, ["data.batch_size=64", "seed=2"])
    assert one.keys() == two.keys()
    return {
        "steps": len(one),
        "first_loss": one[min(one)],
        "last_loss": one[max(one)],
        "max_difference": max(abs(one[step] - two[step]) / max(1.0, abs(one[step])) for step in one),
        "max_difference_of_another_seed": max(abs(one[step] - control[step]) for step in one),
        "bound": BOUND,
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        result = study(Path(folder))
    print(json.dumps(result))
    (Path(__file__).parent / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    good = result["max_difference"] <= BOUND < result["max_difference_of_another_seed"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
