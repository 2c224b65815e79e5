"""A user's own model, data and options, in a folder that holds nothing else."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from warm import Started, run, wait_for, warm

import lightning_opt
from lightning_opt.errors import UntrustedInputError
from lightning_opt.reporting import read_record
from lightning_opt.testing import compare_checkpoints

PACKAGE = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Net(torch.nn.Sequential):
    def __init__(self, width: int = 16):
        layers = torch.nn.Flatten(), torch.nn.Linear(784, width), torch.nn.Dropout(), torch.nn.Linear(width, 10)
        super().__init__(*layers)


class Data(pl.LightningDataModule):
    def setup(self, stage):
        x, y = torch.randn(128, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(128) % 10
        self.samples = TensorDataset(x + y.view(-1, 1, 1, 1) / 3, y)

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.samples, batch_size=16)

    test_dataloader = val_dataloader
"""
CONF = {
    "model/net.yaml": "_target_: my_pkg.Net\nwidth: 12\n",
    "experiment/mine.yaml": """# @package _global_
defaults:
  - override /model: net
task_name: mine
trainer:
  max_epochs: 1
""",
}
OWN = ["model._target_=my_pkg.Net", "data._target_=my_pkg.Data"]
QUICK = ["trainer.max_epochs=3", "benchmark=false", "export=false", "callbacks.checkpoints.every_n_steps=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_pkg.py").write_text(PACKAGE)
    for name, text in CONF.items():
        (folder / "my_conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "my_conf" / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(place, cache):
    """As a user starts it: the console command, in the folder where the package is."""
    command = [sys.executable, "-m", "lightning_opt"]
    words = ["train", *OWN, "model.width=8", *QUICK, "run_dir=whole"]
    out = run(*words, cwd=place, cache=cache, command=command)
    assert out.returncode == 0, out.stderr
    return place / "whole"


def test_own_class_is_trained_with_its_own_arguments(whole):
    state = torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert state["model.1.weight"].shape == (8, 784)
    assert read_record(whole)["status"] == "finished"


def test_killed_run_of_own_data_ends_bit_equal(whole, place, cache):
    """Its plain shuffling DataLoader was made resumable."""
    folder = place / "killed"
    words = [*OWN, "model.width=8", *QUICK, f"run_dir={folder}"]
    process = Started(words, cwd=place, cache=cache)
    wait_for((folder / "checkpoints" / "previous.ckpt").exists, process=process)
    process.signal(signal.SIGKILL)
    assert process.end().returncode == -signal.SIGKILL
    assert not (folder / "fit.json").exists(), "it was over before it was killed: the test tests nothing"
    out = warm(*words, cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert "going on from" in out.stderr
    assert compare_checkpoints(whole / "checkpoints" / "last.ckpt", folder / "checkpoints" / "last.ckpt") == []
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_artifact_of_own_class_needs_trust(whole, place, monkeypatch):
    monkeypatch.syspath_prepend(str(place))
    with pytest.raises(UntrustedInputError, match=r"my_pkg\.Net"):
        lightning_opt.load(whole)
    assert "my_pkg" not in sys.modules, "the refused package was imported"
    model = lightning_opt.load(whole, trusted_targets=["my_pkg.Net"])
    assert type(model).__name__ == "Net"
    state = torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model[1].weight, state["model.1.weight"])


def test_evaluate_of_own_classes_needs_trust(whole, place, cache):
    out = warm("evaluate", f"run_dir={whole}", cwd=place, cache=cache)
    assert out.returncode == 8
    assert "my_pkg." in out.stderr
    assert len(out.stderr.strip().splitlines()) <= 3
    out = warm("evaluate", f"run_dir={whole}", "trusted_targets=[my_pkg.Net,my_pkg.Data]", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert '"acc"' in out.stdout


def test_own_student_and_data_are_distilled(place, cache):
    """Data that gives no fingerprint and no index: the teacher answers live, and that is said."""
    words = ["+experiment=distill", *OWN, *QUICK, "teacher.train.max_epochs=1", "teacher.train.data=null"]
    out = warm(*words, "run_dir=distilled", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert "teacher.cache is not used" in out.stderr
    assert set(read_record(place / "distilled")["models"]) == {"teacher", "baseline", "student"}


def test_argument_that_the_own_class_lacks_is_refused(place, cache):
    out = warm(*OWN, "model.widht=8", "run_dir=refused", cwd=place, cache=cache)
    assert out.returncode == 2
    assert "model.width" in out.stderr
    assert not (place / "refused").exists()


def test_own_options_and_a_sweep_make_two_jobs_with_folders_of_their_own(place, cache):
    words = ["--config-dir", "my_conf", "+experiment=mine", "data._target_=my_pkg.Data", "-m", "seed=1,2"]
    words += ["trainer.limit_val_batches=2"]  # an argument of the class that no option lists needs no plus
    out = warm(*words, "benchmark=false", "export=false", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    records = [read_record(path.parent) for path in (place / "runs" / "mine").glob("*/*/record.json")]
    assert sorted(record["seed"] for record in records) == [1, 2]
    assert all(record["status"] == "finished" for record in records)
    for record in records:
        assert record["models"]["student"]["params"] == 784 * 12 + 12 + 12 * 10 + 10


def test_sweep_with_one_impossible_corner_starts_nothing(place, cache):
    before = sorted(place.rglob("*"))
    out = warm(*OWN, "-m", "seed=1,2", "optimizer.lr=0.1,-1", cwd=place, cache=cache)
    assert out.returncode == 2
    assert "optimizer.lr" in out.stderr
    assert [path for path in sorted(place.rglob("*")) if path not in before and path.name[0] != "."] == []


def test_console_script_is_installed(cache, tmp_path):
    """`lightning-opt` beside the interpreter answers."""
    script = Path(sys.executable).parent / "lightning-opt"
    if not script.exists():
        pytest.skip("the package is not installed here")
    out = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert out.returncode == 0
    assert "train" in out.stdout
