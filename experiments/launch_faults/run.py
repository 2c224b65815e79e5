"""Kill random ranks of a job of two, and launch 32 runs at once: does everything end, resume, and keep to itself?

    python experiments/launch_faults/run.py [--kills 10] [--launches 32]     # 0 keeps what results.json says

Writes results.json beside this file. Exit code 1 where a job hangs, leaves a process behind, does not resume, or two
runs share a file.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
JOB = [
    "data=synthetic_images",
    "data.num_train=128",
    "data.num_eval=33",
    "data.size=8",
    "data.batch_size=8",
    "model=mlp",
    "model.input_shape=[3,8,8]",
    "model.hidden=[16]",
    "model.dropout=0.2",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=4",
    "callbacks.checkpoints.every_n_steps=3",
    "benchmark=false",
    "export=false",
]
TWO = [*JOB, "trainer.devices=2", "strategy=ddp", "strategy.timeout_s=60"]
LONGEST_S = 60 + 30  # the timeout of the strategy and what the job may take beyond it
FAULTS = {"killed": signal.SIGKILL, "hangs": signal.SIGSTOP}


def environment(cache: Path) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(cache)}


def start(words: list, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=cwd,
        env=environment(cwd / "cache"),
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(process: subprocess.Popen) -> dict:
    """Return the process id of each rank that runs."""
    from lightning_opt.config.processes import descendants, is_alive

    found = {}
    for pid in descendants(process.pid):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes()
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"lightning_opt.cli.rank" in words and is_alive(pid):
            named = dict(part.partition(b"=")[::2] for part in variables.split(b"\0"))
            found[int(named.get(b"RANK", named.get(b"LOCAL_RANK", b"0")))] = pid
        elif b"train.py" in words and is_alive(pid):
            found.setdefault(0, pid)  # the fork of the command itself
    return found


def one_fault(words: list, folder: Path, draw: random.Random) -> dict:
    """Start or resume the run, wait until it trains, hit a random rank at a random moment, and see how the job ends."""
    from lightning_opt.config.processes import descendants, is_alive

    before = progress(folder)
    process = start(words, folder.parent)
    while progress(folder) <= before and process.poll() is None:
        time.sleep(0.05)
    time.sleep(draw.uniform(0.0, 2.0))
    if process.poll() is not None:
        return {"error": f"it was over before it was hit: {process.communicate()[1][-500:]}"}
    rank, fault = draw.choice([0, 1]), draw.choice(list(FAULTS))
    below = descendants(process.pid)
    hit = time.monotonic()
    os.kill(ranks_of(process)[rank], FAULTS[fault])
    try:
        _, said = process.communicate(timeout=4 * LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"rank": rank, "fault": fault, "hung": True}
    lines = [line for line in said.splitlines() if line.startswith("lightning-opt:")]
    return {
        "rank": rank,
        "fault": fault,
        "seconds": round(time.monotonic() - hit, 1),
        "exit_code": process.returncode,
        "resumed": before == 0.0 or "going on from" in said,
        "said": lines,
        "names_the_rank": len(lines) == 1 and f"rank {rank} " in lines[0],
        "orphans": sum(is_alive(pid) for pid in below),
    }


def progress(folder: Path) -> float:
    last = folder / "checkpoints" / "last.ckpt"
    return last.stat().st_mtime if last.exists() else 0.0


def faults(kills: int, place: Path, seed: int) -> Iterator[dict]:
    """Hit one run of each launcher again and again, then let it end."""
    draw = random.Random(seed)
    for launcher in ("local", "torchrun"):
        folder = place / launcher
        words = [*TWO, f"launch={launcher}", f"run_dir={folder}", "trainer.max_epochs=400"]
        for _ in range(kills // 2):
            yield {"launch": launcher, **one_fault(words, folder, draw)}
        process = start(words, place)
        process.communicate(timeout=1800)
        yield {"launch": launcher, "end": process.returncode}


def launches(count: int, place: Path) -> dict:
    """Start many runs at once from one process that has the imports behind it, and note who writes what."""
    import lightning_opt.cli.finished
    import lightning_opt.cli.job  # noqa: F401
    from lightning_opt.cli import train

    os.environ |= environment(place / "cache")
    os.chdir(place)
    began = time.monotonic()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(one_launch(train.main, place / f"written-{number}"))
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    writers: dict = {}
    for number in range(count):
        for path in set((place / f"written-{number}").read_text().splitlines()):
            writers.setdefault(path, []).append(number)
    folders = [path.parent for path in (place / "runs").rglob("record.json")]
    shared = sorted(path for path, who in writers.items() if len(who) > 1 and path.startswith(str(place / "runs")))
    return {
        "launches": count,
        "exit_codes": sorted(set(codes)),
        "folders": len(folders),
        "finished": sum(json.loads((path / "record.json").read_text())["status"] == "finished" for path in folders),
        "files_written": len(writers),
        "files_with_two_writers": shared,
        "seconds": round(time.monotonic() - began, 1),
    }


def one_launch(main, log: Path) -> int:
    """Run one job, with every file that is opened to be written noted by the interpreter itself."""
    noted = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            mode, flags = arguments[1], arguments[2] or 0
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR):
                os.write(noted, os.fsencode(os.path.abspath(arguments[0])) + b"\n")
        elif event == "os.rename":
            os.write(noted, os.fsencode(os.path.abspath(arguments[1])) + b"\n")

    sys.addaudithook(note)
    return main([*JOB, "trainer.max_epochs=1", "run_root=runs"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--launches", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    results = Path(__file__).parent / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kills:
            found["faults"] = []
            for one in faults(arguments.kills, Path(folder), arguments.seed):
                print(one, flush=True)
                found["faults"].append(one)
                results.write_text(json.dumps(found, indent=1) + "\n")
        if arguments.launches:
            found["launches"] = launches(arguments.launches, Path(folder))
            print(found["launches"])
            results.write_text(json.dumps(found, indent=1) + "\n")
    together = found["launches"]
    alone = together["exit_codes"] == [0] and together["finished"] == together["folders"] == together["launches"]
    return int(not all(map(is_good, found["faults"])) or not alone or bool(together["files_with_two_writers"]))


def is_good(result: dict) -> bool:
    if "end" in result:
        return result["end"] == 0
    return (
        result.get("exit_code") == 7
        and result["seconds"] <= LONGEST_S
        and result["resumed"]
        and result["names_the_rank"]
        and not result["orphans"]
    )


if __name__ == "__main__":
    sys.exit(main())
