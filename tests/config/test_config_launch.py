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
    assert launch.folder_of_parent() is None
    launch.check_named(None)


def test_a_rank_that_lightning_started_is_told_its_folder(torchrun, tmp_path):
    torchrun.setenv(launch.RUN_DIR, str(tmp_path))
    assert launch.folder_of_parent() == tmp_path
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
    [({"TORCHELASTIC_USE_AGENT_STORE": "False"}, "torchrun"), ({"TORCHELASTIC_MAX_RESTARTS": "1"}, "--max-restarts")],
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
