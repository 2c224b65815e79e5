"""Processes that a launcher has started agree on one run folder, or say that they cannot."""

import csv
import os
import subprocess
import sys

import pytest
from warm import ROOT, TIMEOUT_S, Ranks

from lightning_opt.reporting import read_record

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
    [({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "torchrun"), ({"TORCHELASTIC_MAX_RESTARTS": "3"}, "--max-restarts")],
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


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    """The real one: its environment is what the other tests believe that it is."""
    words = [*TWO, "baseline=false"]
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            ROOT / "train.py",
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(tmp_path / "cache")},
    )
    assert out.returncode == 0, out.stderr
    (folder,) = runs_in(tmp_path)
    assert read_record(folder)["status"] == "finished"
    assert len(list((tmp_path / "cache" / "teachers").glob("*/fit.json"))) == 1
