"""Jobs of a sweep as processes: at once, with their share of the cores, and none takes another with it."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from lightning_opt.config.sweeps_jobs import Job, outcome_of
from lightning_opt.config.sweeps_processes import Processes

# Stands for train.py: its first word says what to do, the last one where.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
act, folder = sys.argv[1], Path(sys.argv[2].partition("=")[2].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
began = time.monotonic()
if act == "stop":
    signal.signal(signal.SIGTERM, lambda number, frame: (folder.joinpath("asked").write_text("yes"), sys.exit(143)))
    folder.joinpath("began").write_text("yes")
    time.sleep(60)
time.sleep(0.3)
names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
told = {"span": [began, time.monotonic()], **{name: os.environ.get(name) for name in names}}
folder.joinpath("told.json").write_text(json.dumps(told))
if act == "fail":
    print("lightning-opt: optimizer.lr=-1: must be greater than 0", file=sys.stderr)
    sys.exit(2)
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def start(*acts, **more):
        jobs = [Job(number=n, point={"a": str(n)}, folder=tmp_path / f"a-{n}") for n in range(len(acts))]
        processes = Processes(program=[sys.executable, "-c", CHILD], folder=tmp_path, **{"n_jobs": 2, **more})
        return jobs, processes.run([([act], job) for act, job in zip(acts, jobs, strict=True)])

    return start


def told(job):
    return json.loads((job.folder / "told.json").read_text())


def test_two_at_once_and_no_third(started):
    jobs, errors = started("work", "work", "work")
    assert errors == [None, None, None]
    spans = [told(job)["span"] for job in jobs]
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 2


def test_cores_are_shared_among_jobs_and_their_ranks(started):
    cores = len(os.sched_getaffinity(0))
    (job, _), _ = started("work", "work", ranks=1)
    assert told(job)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    (job,), _ = started("work", ranks=cores)
    assert told(job)["OMP_NUM_THREADS"] == "1"
    (job,), _ = started("work", threads=3)
    assert told(job)["OMP_NUM_THREADS"] == "3"


def test_each_job_has_gpus_of_its_own(started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    jobs, _ = started("work", "work", ranks=2, gpus=4)
    assert sorted(told(job)["CUDA_VISIBLE_DEVICES"] for job in jobs) == ["4,5", "6,7"]


def test_one_that_fails_and_one_that_is_killed_leave_the_others_alone(started):
    jobs, (failed, killed, fine) = started("fail", "die", "work")
    assert fine is None
    assert told(jobs[2])
    outcome = outcome_of(jobs[0].folder, (), failed)
    assert (outcome.status, outcome.exit_code) == ("failed", 2)
    assert "optimizer.lr=-1: must be greater than 0" in outcome.error
    assert outcome_of(jobs[1].folder, (), killed).exit_code == 128 + signal.SIGKILL


def test_who_asks_the_sweep_to_stop_asks_its_jobs(started, tmp_path):
    def ask():
        while not all((tmp_path / f"a-{n}" / "began").exists() for n in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        started("stop", "stop", "work")
    assert stopped.value.code == 143
    assert [(tmp_path / f"a-{n}" / "asked").exists() for n in (0, 1)] == [True, True]
    assert not (tmp_path / "a-2").exists()
