"""Where a run happened: read without loading anything, and without leaking addresses."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version

from lightning_opt.reporting import environment, problems, record_schema
from lightning_opt.reporting.machine import git_state


def git(folder, *words):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_it_has_the_form_that_the_record_asks_for():
    found = environment()
    schema = record_schema()
    for name in ("versions", "hardware", "git"):
        assert list(problems(found[name], schema["properties"][name] | {"$defs": schema["$defs"]})) == []
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["python"] == platform.python_version()
    assert 1 <= found["hardware"]["cpu"]["cores"] <= os.cpu_count()


def test_the_room_loads_no_framework():
    script = (
        "import json, sys, lightning_opt.reporting as r; found = r.environment();"
        "print(json.dumps([found['hardware']['gpus'],"
        " [m for m in ('torch', 'lightning', 'hydra', 'omegaconf', 'matplotlib.pyplot') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], []]


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert git_state(tmp_path) is None


def test_a_checkout_gives_commit_and_changes_and_no_address(tmp_path):
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) == {"commit": None, "dirty": True}
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    git(tmp_path, "remote", "add", "origin", "https://user:canary@host/x.git")
    state = git_state(tmp_path)
    assert state == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
    assert "canary" not in json.dumps(environment(tmp_path))


def test_a_folder_cannot_make_git_start_a_program(tmp_path):
    git(tmp_path, "init", "-q")
    marker = tmp_path / "started"
    git(tmp_path, "config", "core.fsmonitor", f"touch {marker}")
    git_state(tmp_path)
    assert not marker.exists()


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(".") is None
