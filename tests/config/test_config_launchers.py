"""What a launcher refuses before anything is started, and what follows from its settings."""

import json
import os
import subprocess
import sys

import pytest

from lightning_opt.config import launch, launchers
from lightning_opt.errors import ConfigError

LAUNCHERS = "lightning_opt.config.launchers"


def config(launcher, trainer=None, run_dir=None, **settings):
    target = f"lightning_opt.config.slurm.{launcher}" if launcher == "Slurm" else f"{LAUNCHERS}.{launcher}"
    trainer = {"accelerator": "cpu", "devices": 1, **(trainer or {})}
    return {"task_name": "train", "run_dir": run_dir, "trainer": trainer, "launch": {"_target_": target, **settings}}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", launch.RUN_DIR):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _cluster(monkeypatch, tmp_path):
    """A machine with sbatch and submitit, as far as a check can see."""
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "submitit.py").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (config("Local", {"num_nodes": 2}), r"trainer\.num_nodes=2: .*launch=slurm"),
        (config("Local", grace_s=-1), r"launch\.grace_s=-1"),
        (config("Torchrun", {"num_nodes": 3}, nodes=2), r"trainer\.num_nodes=3 and launch\.nodes=2 contradict"),
        (config("Torchrun", nodes=2), r"launch\.rdzv_endpoint has no value"),
        (config("Torchrun", nodes=2, rdzv_endpoint="a:1"), r"run_dir has no value"),
        (config("Torchrun", max_restarts=-1), r"launch\.max_restarts=-1"),
        (config("Torchrun", {"devices": "auto", "accelerator": "gpu"}), r"trainer\.devices=auto"),
    ],
)
def test_what_cannot_be_started_is_refused(made, says):
    with pytest.raises(ConfigError, match=says):
        launchers.check(made)


def test_slurm_needs_sbatch(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch"):
        launchers.check(config("Slurm"))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (config("Slurm", {"devices": 4}, tasks_per_node=2), r"trainer\.devices=4 and launch\.tasks_per_node=2"),
        (config("Slurm", {"num_nodes": 4}, nodes=2), r"trainer\.num_nodes=4 and launch\.nodes=2"),
        (config("Slurm", tasks_per_node=4, gpus_per_node=2), r"launch\.gpus_per_node=2: 4 tasks"),
        (config("Slurm", {"devices": -1, "accelerator": "gpu"}), r"launch\.tasks_per_node has no value"),
        (config("Slurm", time_min=1, signal_before_end_s=60), r"launch\.signal_before_end_s=60"),
        (config("Slurm", nodes=0), r"launch\.nodes=0"),
    ],
)
@pytest.mark.usefixtures("_cluster")
def test_slurm_refuses_contradictions(made, says):
    with pytest.raises(ConfigError, match=says):
        launchers.check(made)


@pytest.mark.parametrize(
    ("trainer", "settings", "devices"),
    [({}, {"tasks_per_node": 8}, 8), ({"devices": 2}, {}, 2), ({"devices": 2}, {"tasks_per_node": 2}, 2)],
)
@pytest.mark.usefixtures("_cluster")
def test_devices_and_nodes_follow_the_one_place_where_they_are_set(trainer, settings, devices):
    made = config("Slurm", trainer, nodes=3, **settings)
    assert launchers.check(made) == []
    assert (made["trainer"]["devices"], made["trainer"]["num_nodes"]) == (devices, 3)
    launchers.check(made)  # a config that was read back is no contradiction


@pytest.mark.usefixtures("_cluster")
def test_a_launcher_inside_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("Torchrun", "Slurm"):
        with pytest.raises(ConfigError, match="was started by a launcher as one of 2"):
            launchers.check(config(name))
    assert launchers.check(config("Local", {"devices": 2, "num_nodes": 1})) is not None


def test_more_processes_than_cores_are_warned_of():
    (line,) = launchers.check(config("Local", {"devices": 4096}))
    assert line.startswith("trainer.devices=4096")
    assert launchers.check(config("Local", {"devices": 1})) == []


@pytest.mark.parametrize(
    "made", [config("Torchrun", nodes=2, rdzv_endpoint="8.8.8.8:29500", run_dir="x"), config("Local")]
)
def test_a_public_rendezvous_is_warned_of(made, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "8.8.8.8")
    (line,) = launchers.check(made)
    assert "8.8.8.8, which is a public address" in line


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"trainer\.devices=4: this machine has 2 GPUs; set trainer\.devices=2"):
        launchers.check_devices(config("Local", {"accelerator": "gpu", "devices": 4}))
    launchers.check_devices(config("Local", {"accelerator": "gpu", "devices": 2}))
    launchers.check_devices(config("Local", {"devices": 4}))


def test_what_lightning_starts_runs_the_folder_and_no_sweep(monkeypatch, tmp_path):
    """Its own commands repeat the words of the parent, `-m` and all; afterwards they are what they were."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    from lightning_opt.config.lightning_launch import adapted

    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=1,2"])
    before = subprocess_script._basic_subprocess_cmd, subprocess_script._hydra_subprocess_cmd
    assert "seed=1,2" in subprocess_script._basic_subprocess_cmd()
    with adapted(tmp_path):
        words = list(subprocess_script._basic_subprocess_cmd())
        assert list(subprocess_script._hydra_subprocess_cmd(local_rank=1)[0]) == words
    assert words[-1] == str(tmp_path)
    assert "-m" not in words
    assert "seed=1,2" not in words
    assert (subprocess_script._basic_subprocess_cmd, subprocess_script._hydra_subprocess_cmd) == before


def test_a_rank_looks_for_its_folder_alone(tmp_path):
    """The command is run for real: it imports what this process can import, and reads nothing but the folder."""
    (tmp_path / "elsewhere").mkdir()
    command = launch.rank_command(tmp_path)
    variables = {**os.environ, "LOCAL_RANK": "0", "LIGHTNING_OPT_RANKS": str(tmp_path / "room")}
    out = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=variables, capture_output=True, text=True, timeout=200
    )
    assert out.returncode != 0
    (said,) = (tmp_path / "room").glob("0.end")
    assert "resolved.json" in json.loads(said.read_text())["said"]


def test_another_launcher_resumes_the_same_run(tmp_path):
    from lightning_opt.cli.run_folder import save_config

    save_config(tmp_path, config("Local"), "", ["python", "train.py"])
    save_config(tmp_path, config("Torchrun", max_restarts=3), "", ["python", "train.py"])
    with pytest.raises(ConfigError, match=r"trainer\.devices"):
        save_config(tmp_path, config("Local", {"devices": 2}), "", ["python", "train.py"])
