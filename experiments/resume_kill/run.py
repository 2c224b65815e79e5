"""Kill one run again and again, start it with the same command, and compare its end with the uninterrupted run's.

    python experiments/resume_kill/run.py --kills 20

Prints one line of figures and writes results.json beside this file. Exit code 1 where the ends differ.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Small enough to be killed often, and with everything that has state: dropout, batch norm, augmentation, projectors,
# a schedule, checkpoints inside epochs, a teacher and a control that are trained in the same run.
JOB = [
    "+experiment=distill",
    "data=digits",
    "data.variants=4",
    "data.augment={_target_: lightning_opt.data.RandomShift, pixels: 1}",
    "model.dropout=0.2",
    "model.widths=[4,8]",
    "model.image_size=8",
    "loss=[kd,fitnets]",
    "teacher.model.widths=[8,16]",
    "teacher.model.image_size=8",
    "teacher.cache=null",
    "teacher.train.max_epochs=3",
    "trainer.max_epochs=6",
    "trainer.log_every_n_steps=5",
    "callbacks.checkpoints.every_n_steps=7",
    "benchmark=false",
    "export=false",
]


def start(run_dir: Path, cache: Path, overrides: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"run_dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(cache)}
    log = (run_dir.parent / f"{run_dir.name}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_with_kills(
    run_dir: Path, cache: Path, *, kills: int, longest_s: float, overrides: list[str], seed: int
) -> dict:
    """Start, kill at a random time, start again; after the last kill let it end."""
    draw, done, times = random.Random(seed), 0, []
    while True:
        process = start(run_dir, cache, overrides)
        if done == kills:
            assert process.wait(timeout=600) == 0, (run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:]
            return {"kills": done, "killed_after_s": times}
        # Not before it can have trained at all, or nothing would be tested but the start.
        after = draw.uniform(0.25, 1.0) * longest_s
        try:
            code = process.wait(timeout=after)
        except subprocess.TimeoutExpired:
            kill(process)
            done, times = done + 1, [*times, round(after, 2)]
        else:
            assert code == 0, (run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:]
            # It ended before the time was over: shorter times from here on, in a fresh folder of the same run.
            if done < kills:
                longest_s *= 0.8
                for name in ("checkpoints", "fit.json", "record.json"):
                    target = run_dir / name
                    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between the ends of two runs: every tensor, counter, random state and logged number."""
    from lightning_opt.testing import compare_checkpoints

    found = []
    for part in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "baseline/checkpoints/last.ckpt"):
        found += [f"{part}: {path}" for path in compare_checkpoints(one / part, other / part)]
    for part in ("metrics.csv", "baseline/metrics.csv"):
        if (one / part).read_text() != (other / part).read_text():
            found.append(f"{part}: another text")
    for part in ("fit.json", "baseline/fit.json"):
        a, b = (json.loads((folder / part).read_text()) for folder in (one, other))
        a.pop("wall_seconds"), b.pop("wall_seconds")
        if a != b:
            found.append(f"{part}: {a} != {b}")
    return found


def study(folder: Path, *, kills: int, seed: int, overrides: list[str] = JOB) -> dict:
    began = time.monotonic()
    whole = folder / "whole"
    process = start(whole, folder / "cache_whole", overrides)
    assert process.wait(timeout=600) == 0, (folder / "whole.log").read_text()[-3000:]
    seconds = time.monotonic() - began
    killed = folder / "killed"
    # Its own cache: the teacher is killed and resumed like everything else.
    facts = run_with_kills(
        killed, folder / "cache_killed", kills=kills, longest_s=seconds, overrides=overrides, seed=seed
    )
    control = folder / "control"
    process = start(control, folder / "cache_whole", [*overrides, "seed=2"])
    assert process.wait(timeout=600) == 0
    found = differences(whole, killed)
    return {
        **facts,
        "uninterrupted_s": round(seconds, 1),
        "differences": found,
        "bit_equal": not found,
        "another_seed_differs": bool(differences(whole, control)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = study(Path(folder), kills=arguments.kills, seed=arguments.seed)
    print(json.dumps(result))
    (Path(__file__).parent / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["bit_equal"] and result["another_seed_differs"] else 1


if __name__ == "__main__":
    sys.exit(main())
