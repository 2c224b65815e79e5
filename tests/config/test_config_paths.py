"""Run folders: exclusive, named, never somebody else's."""

import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from lightning_opt.cli.run_folder import claim, save_config
from lightning_opt.config.paths import conf_dir, make_run_dir, open_run_dir
from lightning_opt.errors import ConfigError, StorageError


def made(root):
    return str(make_run_dir(root, "task"))


def test_32_launches_at_once_get_32_folders(tmp_path):
    with ProcessPoolExecutor(8) as pool:
        folders = list(pool.map(made, [tmp_path] * 32))
    assert len(set(folders)) == 32
    assert all(os.path.isdir(folder) for folder in folders)


def test_conf_is_found():
    assert (conf_dir() / "train.yaml").is_file()


def test_a_named_folder_is_made_and_reopened(tmp_path):
    folder = open_run_dir(tmp_path / "mine")
    assert folder.is_dir()
    save_config(folder, {"seed": 1}, "seed: 1\n", ["train", "seed=1"])
    assert open_run_dir(tmp_path / "mine") == folder


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        open_run_dir(tmp_path)


def test_a_root_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="run_root"):
        make_run_dir(tmp_path / "file", "task")


def test_another_config_in_the_same_folder_is_refused_by_key(tmp_path):
    config = {"seed": 1, "optimizer": {"lr": 0.1}, "run_dir": None, "run_root": "runs"}
    save_config(tmp_path, config, "", ["train"])
    save_config(tmp_path, {**config, "run_root": "elsewhere"}, "", ["train"])
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        save_config(tmp_path, {**config, "optimizer": {"lr": 0.2}}, "", ["train"])
    with pytest.raises(ConfigError, match="baseline"):
        save_config(tmp_path, {**config, "baseline": True}, "", ["train"])


def test_secrets_in_a_command_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-canary-123456789")
    save_config(tmp_path, {"seed": 1}, "", ["train", "logger.wandb.api_key=sk-canary-123456789"])
    written = "".join(path.read_text() for path in (tmp_path / ".hydra").iterdir())
    assert "canary" not in written


def test_two_processes_cannot_own_one_folder(tmp_path):
    import subprocess
    import sys

    lines = ["from pathlib import Path", "from lightning_opt.cli.run_folder import claim"]
    code = "\n".join([*lines, f"with claim(Path({str(tmp_path)!r})): pass"])
    with claim(tmp_path):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "in use by process" in out.stderr
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
