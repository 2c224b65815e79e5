"""A rank that is killed, fails or hangs ends the job: in time, with one line that names it, and nobody is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from warm import ROOT, TIMEOUT_S, wait_for

from lightning_opt.cli import supervise
from lightning_opt.cli.guard import guarded
from lightning_opt.config import ranks
from lightning_opt.config.processes import descendants, die_with_parent, is_alive
from lightning_opt.errors import ConfigError, NonFiniteError, PeerLostError
from lightning_opt.reporting import new_record, read_record, write_record
from lightning_opt.testing.ranks import free_port

TIMEOUT_OF_GLOO_S = 3.0
GRACE_S = 2.0


def part(rank, port, faulty, fault):
    """Take part in a job that reduces something many times; the faulty rank does its worst in the middle."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    timeout = timedelta(seconds=TIMEOUT_OF_GLOO_S)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timeout)
    for step in range(1000):
        if rank == faulty and step == 20:
            fault()
        dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
    return 0


def job_of_two(folder, faulty, fault):
    """Return what rank 0 does: start rank 1 as Lightning would, and train along with it."""

    def run():
        ranks.enter(folder, rank=0, processes=2)
        port = free_port()
        child = subprocess_by_fork(lambda: (ranks.enter(folder, rank=1, processes=2), part(1, port, faulty, fault))[1])
        threading.Thread(target=note_end, args=(child,), daemon=True).start()
        part(0, port, faulty, fault)
        return {"done": True}

    return run


def subprocess_by_fork(do):
    pid = os.fork()
    if pid:
        return pid
    os.environ["LOCAL_RANK"] = "1"
    die_with_parent()  # as `cli.rank` does
    os._exit(guarded(do))


def note_end(pid):
    _, status = os.waitpid(pid, 0)
    ranks.here().note_status(1, os.waitstatus_to_exitcode(status))


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def failing():
    raise ZeroDivisionError("no such luck")


def sleeping():
    time.sleep(1000)


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def diverging():
    raise NonFiniteError("step 20: the loss is NaN; lower the learning rate")


@contextmanager
def nobody_left():
    before = set(descendants(os.getpid()))
    yield
    assert set(descendants(os.getpid())) <= before


def supervised(folder, faulty, fault):
    write_record(folder, new_record(["train"], seed=1, config_sha256="0" * 64, task_name="train"))
    with nobody_left():
        return supervise.run_forked(job_of_two(folder, faulty, fault), grace_s=GRACE_S)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (killed, r"rank {} was killed by signal 9 \(SIGKILL"),
        (failing, r"rank {} failed: ZeroDivisionError: no such luck"),
        (sleeping, r"rank {} hangs"),
        (stopped, r"rank {} hangs"),
    ],
    ids=["killed", "failing", "sleeping", "stopped"],
)
def test_the_job_ends_in_time_and_names_the_rank(fault, says, rank, tmp_path, capfd):
    began = time.monotonic()
    with pytest.raises(PeerLostError, match=says.format(rank)) as caught:
        supervised(tmp_path, rank, fault)
    assert time.monotonic() - began < TIMEOUT_OF_GLOO_S + 30
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 7
    record = read_record(tmp_path)
    assert record["status"] == "failed"
    assert f"rank {rank}" in record["error"]
    printed = capfd.readouterr().err
    assert printed.count("Traceback") == (1 if fault is failing else 0), printed  # of the guilty, and of nobody else


@pytest.mark.parametrize(("rank", "says"), [(0, r"^step 20: the loss"), (1, r"^rank 1: step 20: the loss")])
def test_an_error_that_is_foreseen_keeps_its_code(rank, says, tmp_path):
    with pytest.raises(NonFiniteError, match=says):
        supervised(tmp_path, rank, diverging)


def test_a_good_job_hands_its_result_back_and_leaves_the_environment(tmp_path):
    before = dict(os.environ)
    assert supervised(tmp_path, faulty=None, fault=None) == {"done": True}
    assert dict(os.environ) == before


def test_a_refusal_comes_through_as_it_is():
    def refuse():
        raise ConfigError("seed=-1: must be at least 0")

    with nobody_left(), pytest.raises(ConfigError, match=r"^seed=-1: must be at least 0$"):
        supervise.run_forked(refuse, grace_s=GRACE_S)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_reaches_rank_0_and_its_code_comes_back(number, code):
    from lightning_opt.checkpointing.signals import EndNow

    def wait():
        with EndNow():
            os.kill(os.getppid(), number)  # as a scheduler does: to the process that it knows
            time.sleep(30)

    with nobody_left(), pytest.raises(SystemExit) as caught:
        supervise.run_forked(wait, grace_s=GRACE_S)
    assert caught.value.code == code


def test_ranks_die_with_the_process_that_watches_them(tmp_path):
    """SIGKILL for the command itself: the system ends the rest."""
    pid = os.fork()
    if pid == 0:
        supervised(tmp_path, faulty=1, fault=sleeping)
    wait_for(lambda: len(descendants(pid)) == 2)
    below = descendants(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: not any(is_alive(one) for one in below), timeout_s=20)


JOB = [
    "data=synthetic_images",
    "data.num_train=256",
    "data.num_eval=33",
    "data.size=8",
    "data.batch_size=8",
    "model=mlp",
    "model.input_shape=[3,8,8]",
    "model.hidden=[16]",
    "trainer.max_epochs=50",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "callbacks.checkpoints.every_n_steps=4",
    "benchmark=false",
    "export=false",
]


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_S)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "pipeline"])
def test_the_command_itself_ends_with_7_and_one_line_when_a_rank_is_killed(strategy, tmp_path):
    words = [*JOB, f"strategy={strategy}", f"run_dir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(
        lambda: (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() or process.poll() is not None, timeout_s=900
    )
    below = descendants(process.pid)
    (rank_1,) = [pid for pid in below if b"lightning_opt.cli.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(rank_1, signal.SIGKILL)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 7, said
    errors = [line for line in said.splitlines() if line.startswith("lightning-opt:")]
    assert errors == [line for line in errors if "rank 1 was killed by signal 9" in line]
    assert len(errors) == 1
    assert "Traceback" not in said
    assert not any(is_alive(pid) for pid in below)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert read_record(tmp_path / "run")["status"] == "failed"
