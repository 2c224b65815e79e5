"""What the environment says of a process, and what it does about it."""

import os

import pytest

from lightning_opt.config import launch
from lightning_opt.errors import ConfigError, PeerLostError

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.fixture
def torchrun(monkeypatch):
    monkeypatch.delenv(launch.RUN_DIR, raising=False)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_plain_process_is_nobodys_rank(monkeypatch):
    for name in (*TORCHRUN, launch.RUN_DIR):
        monkeypatch.delenv(name, raising=False)
    assert launch.rank() == 0
    assert not launch.launched_from_outside()
    launch.check_named(None)


def test_a_rank_of_our_own_is_no_stranger(torchrun, tmp_path):
    torchrun.setenv(launch.RUN_DIR, str(tmp_path))
    assert not launch.launched_from_outside()


def test_alone_it_is_no_rank_and_afterwards_again(torchrun):
    torchrun.setenv("MY_OWN", "1")
    before = dict(os.environ)
    with launch.as_one_process():
        assert not launch.launched_from_outside()
        assert not any(name in os.environ for name in TORCHRUN)
        assert os.environ["MY_OWN"] == "1"
    assert dict(os.environ) == before
    assert launch.launched_from_outside()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "torchrun"),
        ({"TORCHELASTIC_MAX_RESTARTS": "1", "GROUP_WORLD_SIZE": "2"}, "--max-restarts"),
    ],
)
def test_a_name_is_asked_for(torchrun, variables, says):
    launch.check_named(None)
    for name, value in variables.items():
        torchrun.setenv(name, value)
    launch.check_named("runs/mine")
    with pytest.raises(ConfigError, match=rf"run_dir has no value.*{says}"):
        launch.check_named(None)


def test_waiting_ends_with_the_file_or_with_the_launcher(tmp_path, monkeypatch):
    (tmp_path / "there").touch()
    launch.wait_for_file(tmp_path / "there")
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(PeerLostError, match="launcher is gone"):
        launch.wait_for_file(tmp_path / "never")


def test_srun_tells_what_torch_and_lightning_read(monkeypatch):
    for name in (*TORCHRUN, launch.RUN_DIR):
        monkeypatch.delenv(name, raising=False)
    slurm = {
        "SLURM_JOB_ID": "70123",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_NTASKS": "4",
    }
    with monkeypatch.context() as patch:
        for name, value in slurm.items():
            patch.setenv(name, value)
        launch.take_part_in_srun()
        assert (launch.rank(), launch.processes(), launch.launched_from_outside()) == (3, 4, True)
        said = {name: os.environ[name] for name in ("LOCAL_RANK", "NODE_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
        assert said == {"LOCAL_RANK": "1", "NODE_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
        assert os.environ["MASTER_PORT"] == "15123"
        assert "SLURM_NTASKS" not in os.environ, "Lightning would read SLURM's variables by itself"
        for name in (*TORCHRUN, "NODE_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)


def test_a_process_inside_an_allocation_that_srun_has_not_started_is_alone(monkeypatch):
    for name in (*TORCHRUN, launch.RUN_DIR, "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    launch.take_part_in_srun()
    assert not launch.launched_from_outside()
    assert "SLURM_NTASKS" not in os.environ


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("127.0.0.1", None),
        ("10.1.2.3", None),
        ("192.168.0.7", None),
        ("8.8.8.8", "8.8.8.8"),
        ("no.such.host.invalid", None),
    ],
)
def test_a_public_address_is_told_apart(address, public):
    assert launch.public_address(address) == public
