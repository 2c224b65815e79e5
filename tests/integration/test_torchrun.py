"""Processes that a launcher has started agree on one run folder, or say that they cannot."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from warm import ROOT, TIMEOUT_S, Ranks, wait_for

from lightning_opt.config.processes import descendants, is_alive
from lightning_opt.reporting import read_record
from lightning_opt.testing.ranks import free_port

JOB = [
    "+experiment=distill",
    "data=synthetic_images",
    "data.num_train=128",
    "data.num_eval=33",
    "data.size=8",
    "data.batch_size=8",
    "model=mlp",
    "model.input_shape=[3,8,8]",
    "model.hidden=[16]",
    "teacher.model._target_=lightning_opt.models.MLP",
    "teacher.model.input_shape=[3,8,8]",
    "teacher.model.hidden=[32]",
    "teacher.train.max_epochs=1",
    "teacher.train.data=null",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoints.every_n_steps=2",
    "benchmark=false",
    "export=false",
]
TWO = [*JOB, "trainer.devices=2", "strategy=ddp"]


def runs_in(place):
    return [path for path in (place / "runs" / "distill").iterdir() if path.is_dir()]


def assert_one_run(folder, started):
    """One folder, one log, one record; the other rank was silent."""
    assert read_record(folder)["status"] == "finished"
    assert (folder / "train.log").read_text().count("distilled student: training in") == 1
    assert started[1].stdout == ""
    with (folder / "metrics.csv").open() as file:
        losses = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 8  # of 128 samples, 2 ranks of 8: each rank saw its half


def test_ranks_agree_on_one_folder(tmp_path):
    """Nothing is named; the teacher is trained, and its answers stored, by one of them."""
    ended = Ranks(TWO, cwd=tmp_path, cache=tmp_path / "cache").end()
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    (folder,) = runs_in(tmp_path)
    assert_one_run(folder, ended)
    assert len(list((tmp_path / "cache" / "teachers").glob("*/fit.json"))) == 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "torchrun"),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"}, "--max-restarts"),
    ],
    ids=["another launcher", "restarts"],
)
def test_a_name_is_asked_for_where_the_ranks_could_not_agree(environment, says, tmp_path):
    ranks = Ranks(TWO, cwd=tmp_path, cache=tmp_path / "cache", **environment)
    first = ranks.ranks[0].end()
    ranks.kill()
    ranks.end()
    assert first.returncode == 2
    assert "run_dir has no value" in first.stderr
    assert says in first.stderr
    assert len(first.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_named_folder_is_shared_and_a_finished_one_not_run_again(tmp_path):
    """All that a launcher without a store needs."""
    words = [*TWO, "baseline=false", f"run_dir={tmp_path / 'mine'}"]
    how = {"cwd": tmp_path, "cache": tmp_path / "cache", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    ended = Ranks(words, **how).end()
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert_one_run(tmp_path / "mine", ended)
    log = (tmp_path / "mine" / "train.log").read_text()
    ended = Ranks(words, **how).end()
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert "is finished" in ended[0].stderr
    assert (tmp_path / "mine" / "train.log").read_text() == log


@pytest.mark.parametrize(
    ("words", "says"),
    [(JOB, "trainer.devices=2"), ([*TWO, "-m", "seed=1,2"], "-m")],
    ids=["another number of devices", "a sweep"],
)
def test_what_torchrun_cannot_start_is_refused_by_rank_0(words, says, tmp_path):
    ranks = Ranks(words, cwd=tmp_path, cache=tmp_path / "cache")
    first = ranks.ranks[0].end()
    ranks.kill()  # as torchrun does when a worker has failed
    ranks.end()
    assert first.returncode == 2, first.stderr
    assert says in first.stderr
    assert len(first.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def torchrun(*options, words, cwd):
    """Start the real one."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, ROOT / "train.py", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(cwd / "cache")},
    )


def ranks_below(process):
    """Return the ranks that run, by their number, once they have imported what they need."""
    found = {}
    for pid in descendants(process.pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        rank = next((word for word in variables if word.startswith(b"RANK=")), None)
        if rank is not None:
            found.setdefault(int(rank[5:]), pid)
    return found


def kill_once_it_has_saved(process, folder, rank):
    last = folder / "checkpoints" / "last.ckpt"
    wait_for(lambda: last.exists() or process.poll() is not None)
    os.kill(ranks_below(process)[rank], signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    """The real one: its environment is what the other tests believe that it is."""
    process = torchrun("--nproc-per-node=2", "--standalone", words=[*TWO, "baseline=false"], cwd=tmp_path)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    (folder,) = runs_in(tmp_path)
    assert read_record(folder)["status"] == "finished"
    assert len(list((tmp_path / "cache" / "teachers").glob("*/fit.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_killed_ranks_again_in_the_same_folder(rank, tmp_path):
    """Nothing is named: the ranks of the next round find the folder, and each other, in the store of the first."""
    words = [*TWO, "baseline=false", "trainer.max_epochs=60"]
    process = torchrun("--nproc-per-node=2", "--standalone", "--max-restarts=2", words=words, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "runs" / "distill").is_dir() or process.poll() is not None)
    kill_once_it_has_saved(process, runs_in(tmp_path)[0], rank)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    (folder,) = runs_in(tmp_path)
    assert read_record(folder)["status"] == "finished"
    assert "going on from last.ckpt" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_two_nodes_of_torchrun(tmp_path):
    """Two machines' worth of torchrun on this one share one folder."""
    words = [*JOB, "trainer.devices=1", "trainer.num_nodes=2", "strategy=ddp", "baseline=false", "run_dir=mine"]
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    nodes = [torchrun(*meet, "--rdzv-id=test", words=words, cwd=tmp_path) for _ in range(2)]
    said = [node.communicate(timeout=TIMEOUT_S)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert read_record(tmp_path / "mine")["status"] == "finished"
    assert (tmp_path / "mine" / "train.log").read_text().count("distilled student: training in") == 1


def launched(*words, cwd):
    """Start `python train.py launch=torchrun`."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TWO, "baseline=false", "launch=torchrun", "run_dir=mine", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(cwd / "cache")},
    )


@pytest.mark.slow
def test_the_command_starts_torchrun_which_starts_a_killed_rank_again(tmp_path):
    process = launched("launch.max_restarts=1", "trainer.max_epochs=60", cwd=tmp_path)
    kill_once_it_has_saved(process, tmp_path / "mine", rank=1)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert read_record(tmp_path / "mine")["status"] == "finished"
    assert "going on from last.ckpt" in (tmp_path / "mine" / "train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_a_killed_rank_is_named_and_the_job_ends_with_7(rank, tmp_path):
    process = launched("trainer.max_epochs=60", cwd=tmp_path)
    kill_once_it_has_saved(process, tmp_path / "mine", rank)
    below = descendants(process.pid)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 7, said
    errors = [line for line in said.splitlines() if line.startswith("lightning-opt:")]
    assert len(errors) == 1
    assert f"rank {rank} was killed by signal 9" in errors[0]
    assert not any(is_alive(pid) for pid in below)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_command_saves_and_starts_nothing_again(number, code, tmp_path):
    process = launched("launch.max_restarts=3", "trainer.max_epochs=60", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "mine" / "checkpoints" / "last.ckpt").exists() or process.poll() is not None)
    process.send_signal(number)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, said
    assert read_record(tmp_path / "mine")["status"] == "interrupted"
    assert (tmp_path / "mine" / "train.log").read_text().count("training in") == 1
