"""A real SLURM: `scripts/slurm/one_machine.sh start`, `export SLURM_CONF=...`, then `pytest -m slurm`."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from warm import ROOT, TIMEOUT_S, wait_for

from lightning_opt.reporting import read_record

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(4 * TIMEOUT_S),
    pytest.mark.skipif(
        shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
        reason="no SLURM answers: scripts/slurm/one_machine.sh start",
    ),
]

LONGEST_S = 3 * TIMEOUT_S
JOB = [
    "data=synthetic_images",
    "data.num_train=128",
    "data.num_eval=33",
    "data.size=8",
    "data.batch_size=8",
    "model=mlp",
    "model.input_shape=[3,8,8]",
    "model.hidden=[16]",
    "trainer.accelerator=cpu",
    "callbacks.checkpoints.every_n_steps=8",
    "benchmark=false",
    "export=false",
    "launch=slurm",
    "launch.tasks_per_node=2",
    "strategy=ddp",
]


@pytest.fixture(autouse=True)
def _submitit():
    pytest.importorskip("submitit")


def submit(*words, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *JOB, *words],
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(cwd / "cache")},
    )


def submitted(*words, cwd):
    """Submit a job; return its id and its folder as the command prints them."""
    out = submit(*words, cwd=cwd)
    assert out.returncode == 0, out.stderr
    (line,) = [line for line in out.stdout.splitlines() if line.startswith("job ")]
    job, folder = line.removeprefix("job ").split(": ")
    return job, cwd / folder


def field(job, name):
    out = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True, check=True).stdout
    return dict(word.partition("=")[::2] for word in out.split() if "=" in word)[name]


def wait_for_state(job, *states):
    wait_for(lambda: field(job, "JobState") in states, timeout_s=LONGEST_S)


def said(folder):
    return "".join(path.read_text() for path in sorted((folder / "slurm").glob("*_log.*")))


def in_training(folder):
    return (folder / "checkpoints" / "last.ckpt").exists()


def test_two_tasks_are_one_run_and_the_command_waits_if_asked(tmp_path):
    out = submit("trainer.max_epochs=2", "launch.wait=true", "run_dir=mine", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    folder = tmp_path / "mine"
    record = read_record(folder)
    assert record["status"] == "finished"
    log = (folder / "train.log").read_text()
    assert log.count("model: training in") == 1
    assert "after 16 steps" in log  # of 128 samples, 2 ranks of 8, twice: each rank saw its half
    again = submit("trainer.max_epochs=2", "launch.wait=true", "run_dir=mine", cwd=tmp_path)
    assert again.returncode == 0
    assert "is finished" in again.stderr


def test_a_preempted_job_saves_is_queued_again_and_goes_on_in_its_folder(tmp_path):
    job, folder = submitted("trainer.max_epochs=100", cwd=tmp_path)
    wait_for(lambda: in_training(folder), timeout_s=LONGEST_S)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait_for_state(job, "PENDING")
    assert read_record(folder)["status"] == "interrupted"
    subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True)  # else after two minutes
    wait_for_state(job, "COMPLETED")
    assert field(job, "Restarts") == "1"
    assert read_record(folder)["status"] == "finished", said(folder)
    log = (folder / "train.log").read_text()
    assert "stopped by a signal" in log
    assert "going on from last.ckpt" in log
    assert [path.name for path in (tmp_path / "runs" / "train").iterdir()] == [folder.name]


def test_the_end_of_its_time_is_announced_by_the_signal(tmp_path):
    """The real timer: `#SBATCH --signal`."""
    words = ["trainer.max_epochs=100000", "launch.time_min=2", "launch.signal_before_end_s=30", "launch.max_requeues=1"]
    job, folder = submitted(*words, cwd=tmp_path)
    try:
        wait_for(lambda: int(field(job, "Restarts")) == 1, timeout_s=LONGEST_S)
        assert read_record(folder)["status"] == "interrupted"
        assert "is queued again" in said(folder)
    finally:
        subprocess.run(["scancel", job], check=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_task_ends_the_job_with_7_and_is_named(rank, tmp_path):
    job, folder = submitted("trainer.max_epochs=100000", cwd=tmp_path)
    wait_for(lambda: in_training(folder), timeout_s=LONGEST_S)
    (here,) = (folder / ".ranks").glob(f"*/{rank}.here")
    os.kill(json.loads(here.read_text())["pid"], 9)
    wait_for_state(job, "FAILED", "NODE_FAIL", "CANCELLED")
    assert f"rank {rank} was killed" in said(folder) or f"rank {rank} is gone" in said(folder), said(folder)
    assert field(job, "ExitCode") == "7:0"


def test_what_the_cluster_refuses_is_one_line(tmp_path):
    out = submit("launch.partition=nowhere", cwd=tmp_path)
    assert out.returncode == 2, out.stderr
    (line,) = [line for line in out.stderr.splitlines() if line.startswith("lightning-opt:")]
    assert "launch=slurm: the cluster refuses the job" in line
