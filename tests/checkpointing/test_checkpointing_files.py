"""Durable files: killed at any system call, damaged in any way, a full disk, hostile content."""

import errno
import functools
import io
import json
import logging
import os
import pickle
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.checkpointing import (
    CheckpointDamagedError,
    DurableCheckpointIO,
    find_checkpoint,
    load_primitives,
    require_free_space,
    sweep_stale_temps,
)
from lightning_opt.checkpointing.files import keep_a_copy, manifest_path, read_manifest, verify
from lightning_opt.checkpointing.primitives import to_primitives
from lightning_opt.errors import ConfigError, NoCheckpointError, StorageError, UntrustedInputError

IO = DurableCheckpointIO()


def checkpoint(step, size=500):
    return {"global_step": step, "epoch": step // 10, "state_dict": {"w": torch.full((size,), float(step))}}


def save(path, step, size=500):
    IO.save_checkpoint(checkpoint(step, size), path)


def test_what_is_saved_is_loaded_and_described(tmp_path):
    save(tmp_path / "last.ckpt", 12)
    loaded = IO.load_checkpoint(tmp_path / "last.ckpt")
    assert loaded["global_step"] == 12
    assert torch.equal(loaded["state_dict"]["w"], torch.full((500,), 12.0))
    manifest = json.loads((tmp_path / "last.ckpt.json").read_text())
    assert manifest["entry"]["size"] == (tmp_path / "last.ckpt").stat().st_size
    assert (manifest["entry"]["step"], manifest["entry"]["epoch"]) == (12, 1)
    assert manifest["published"]
    assert manifest["replaces"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"]


def run_and_kill_at_call(number, job):
    """Run a job in a fork that kills itself -9 before its `number`-th system call on files; True if it was killed."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def counted(call):
            def run(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return run

        for name in ("open", "write", "fsync", "replace", "link", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def rotate_and_save(folder, step):  # the first time there is nothing to keep
    keep_a_copy(folder / "last.ckpt", as_path=folder / "previous.ckpt")
    save(folder / "last.ckpt", step)


@pytest.mark.parametrize("versions", [0, 2])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path, versions):
    number, killed = 0, True
    (tmp_path / "0").mkdir()
    for step in range(versions):
        rotate_and_save(tmp_path / "0", step)
    while killed:
        number += 1
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "0", folder)
        job = (
            functools.partial(rotate_and_save, folder, 9)
            if versions
            else functools.partial(save, folder / "last.ckpt", 9)
        )
        killed = run_and_kill_at_call(number, job)
        found = find_checkpoint(folder)
        if found is None:
            assert versions == 0
            assert killed
        else:
            steps = {9, versions - 1} if versions else {9}
            assert IO.load_checkpoint(found)["global_step"] in steps
        # not only the newest: nothing that was whole is now called damaged
        for path in folder.glob("*.ckpt"):
            verify(path)
        sweep_stale_temps(folder)
        assert not list(folder.glob(".*"))
        rotate_and_save(folder, 10)  # and the next save finds its way
        assert IO.load_checkpoint(find_checkpoint(folder))["global_step"] == 10
    assert number > 10  # the loop did go through the protocol


@pytest.mark.parametrize(
    "damage", ["empty", "one byte", "half", "99 %", "flipped", "other file", "gone", "no manifest"]
)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    save(tmp_path / "last.ckpt", 1)
    rotate_and_save(tmp_path, 2)
    last = tmp_path / "last.ckpt"
    data = last.read_bytes()
    if damage == "flipped":
        last.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif damage == "other file":
        torch.save(checkpoint(7), last)
    elif damage == "gone":
        last.unlink()
    elif damage == "no manifest":
        manifest_path(last).unlink()
    else:
        last.write_bytes(data[: {"empty": 0, "one byte": 1, "half": len(data) // 2}.get(damage, len(data) * 99 // 100)])
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == tmp_path / "previous.ckpt"
    (record,) = caplog.records
    assert str(last) in record.getMessage()
    if damage != "no manifest":
        with pytest.raises(CheckpointDamagedError, match=r"missing|damaged"):
            IO.load_checkpoint(last)


def test_every_flipped_byte_is_found(tmp_path):
    save(tmp_path / "last.ckpt", 1, size=20)
    path = tmp_path / "last.ckpt"
    data = path.read_bytes()
    for offset in np.linspace(0, len(data) - 1, 100).astype(int):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :])
        with pytest.raises(CheckpointDamagedError, match="sha256"):
            verify(path)


def test_none_only_if_none_was_ever_written(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoint(tmp_path) is None
    save(tmp_path / "last.ckpt", 1)
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(NoCheckpointError, match=r"last\.ckpt") as caught:
        find_checkpoint(tmp_path)
    assert caught.value.exit_code == 3


def test_a_damaged_manifest_is_damage(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    manifest_path(tmp_path / "last.ckpt").write_text('{"entry": ')
    with pytest.raises(NoCheckpointError):
        find_checkpoint(tmp_path)


def test_best_and_others_are_the_last_resort(tmp_path):
    for name, step in (("best.ckpt", 5), ("a.ckpt", 7), ("b.ckpt", 9)):
        save(tmp_path / name, step)
    assert find_checkpoint(tmp_path).name == "best.ckpt"
    (tmp_path / "best.ckpt").write_bytes(b"x")
    assert find_checkpoint(tmp_path).name == "b.ckpt"


def test_remove_leaves_nothing_that_looks_lost(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    IO.remove_checkpoint(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []
    assert find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("after_bytes", [0, 300, 2500])
def test_a_failing_disk_leaves_the_previous_file(tmp_path, monkeypatch, code, after_bytes):
    save(tmp_path / "last.ckpt", 1)
    written, write = 0, os.write

    def failing(descriptor, data):
        nonlocal written
        written += len(data)
        if written > after_bytes:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(StorageError, match=rf"last\.ckpt.*{os.strerror(code)}.*\d+ bytes free.*previous") as caught:
        save(tmp_path / "last.ckpt", 2)
    monkeypatch.undo()
    assert caught.value.exit_code == 4
    assert "bytes needed" in str(caught.value)
    assert IO.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.json"]


def test_too_large_a_file_for_the_system(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    pid = os.fork()
    if pid == 0:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            save(tmp_path / "last.ckpt", 2, size=5000)
        except StorageError as error:
            os._exit(error.exit_code if "bytes needed" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert IO.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    assert not list(tmp_path.glob(".*"))


def test_needed_bytes_are_those_of_the_file(tmp_path, monkeypatch):
    save(tmp_path / "last.ckpt", 1)
    size = (tmp_path / "last.ckpt").stat().st_size
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match=f"{size} bytes needed"):
        save(tmp_path / "last.ckpt", 2)


def test_preflight_names_needed_and_free_bytes(tmp_path):
    require_free_space(tmp_path / "not" / "yet", needed_bytes=1)
    with pytest.raises(StorageError, match=r"need about 1000000000000000000 bytes, \d+ are free"):
        require_free_space(tmp_path, needed_bytes=10**18)


def test_temps_of_dead_processes_are_swept(tmp_path):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    dead, alive = tmp_path / f".last.ckpt.tmp.{pid}.0a", tmp_path / f".last.ckpt.tmp.{os.getppid()}.0b"
    same_number = tmp_path / f".last.ckpt.tmp.{os.getpid()}.0c"  # of an earlier process with this number
    other = tmp_path / ".last.ckpt.tmp.txt"
    for path in (dead, alive, same_number, other):
        path.write_bytes(b"x")
    assert set(sweep_stale_temps(tmp_path)) == {dead, same_number}
    assert alive.exists()
    assert other.exists()


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["zip", "legacy", "nested", "raw pickle", "in a tensor"])
def test_hostile_files_run_nothing(tmp_path, monkeypatch, kind, force):
    sentinel, path = tmp_path / "sentinel", tmp_path / "evil.ckpt"
    evil = Evil(sentinel)
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if kind == "nested":
        torch.save({"state_dict": {}, "hyper_parameters": {"a": [{"b": (1, evil)}]}}, path)
    elif kind == "raw pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    elif kind == "in a tensor":
        tensor = torch.zeros(2)
        tensor.payload = evil
        torch.save({"state_dict": {"w": tensor}}, path)
    else:
        torch.save({"state_dict": evil}, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UntrustedInputError, match="mkdir") as caught:  # so the payload was met, and not run
        IO.load_checkpoint(path)
    assert caught.value.exit_code == 8
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not sentinel.exists()


def test_a_hostile_file_in_place_of_ours_is_damage(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    torch.save({"x": Evil(tmp_path / "sentinel")}, tmp_path / "last.ckpt")
    with pytest.raises(NoCheckpointError):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointDamagedError):
        IO.load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "sentinel").exists()


def test_a_scripted_module_is_no_checkpoint(tmp_path):
    path = tmp_path / "net.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("net/data.pkl", b""), ("net/constants.pkl", b""), ("net/version", b"3\n")):
            archive.writestr(name, content)
    with pytest.raises((UntrustedInputError, CheckpointDamagedError), match=r"net\.ckpt"):
        load_primitives(path)


def test_weights_only_false_is_refused(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    with pytest.raises(UntrustedInputError, match="weights_only off"):
        IO.load_checkpoint(tmp_path / "last.ckpt", **{"weights_only": False})


@pytest.mark.parametrize("url", ["https://host/a.ckpt", "s3://bucket/a.ckpt", "https://host/a.ckpt#sha256=12"])
def test_urls_need_a_sha256(url):
    with pytest.raises(UntrustedInputError, match="sha256"):
        IO.load_checkpoint(url)


def test_a_url_with_its_sha256(tmp_path, monkeypatch):
    save(tmp_path / "last.ckpt", 4)
    data = (tmp_path / "last.ckpt").read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(data))
    digest = read_manifest(tmp_path / "last.ckpt").entry.sha256
    assert IO.load_checkpoint(f"https://host/a.ckpt#sha256={digest}")["global_step"] == 4
    with pytest.raises(UntrustedInputError, match=digest):
        IO.load_checkpoint(f"https://host/a.ckpt#sha256={'0' * 64}")


def test_a_foreign_file_is_loaded_with_a_warning(tmp_path):
    torch.save(checkpoint(3), tmp_path / "foreign.ckpt")
    with pytest.warns(UserWarning, match="no manifest"):
        assert IO.load_checkpoint(tmp_path / "foreign.ckpt")["global_step"] == 3


class StrictInt(int):
    pass


@pytest.mark.parametrize(
    "value", [Path("x"), nn.Linear(1, 1), np.zeros(3), StrictInt(1), slice(1), len], ids=lambda v: type(v).__name__
)
def test_what_could_not_be_loaded_is_refused_by_its_path(tmp_path, value):
    with pytest.raises(ConfigError, match=r"hyper_parameters\.a\[1\]\.b"):
        IO.save_checkpoint({"hyper_parameters": {"a": [0, {"b": value}]}}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_config_object_is_refused(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    with pytest.raises(ConfigError, match=r"checkpoint\[cfg\] is a omegaconf.*DictConfig"):
        IO.save_checkpoint({"cfg": omegaconf.OmegaConf.create({"a": 1})}, tmp_path / "x.ckpt")


def test_numpy_scalars_become_numbers_and_the_rest_stays(tmp_path):
    module = nn.BatchNorm1d(2)
    value = {"a": np.float32(0.5), "n": [np.int64(3), {"b": np.bool_(True)}], "t": (1, 2.5, None), "s": {1, 2}}
    value |= {"state": module.state_dict(), "size": torch.Size([2]), "device": torch.device("cpu"), "d": torch.float32}
    value |= {"bytes": b"x", "z": 1j, np.str_("key"): "k"}
    IO.save_checkpoint(value, tmp_path / "x.ckpt")
    loaded = IO.load_checkpoint(tmp_path / "x.ckpt")
    assert (loaded["a"], loaded["n"], loaded["t"], loaded["s"]) == (0.5, [3, {"b": True}], (1, 2.5, None), {1, 2})
    assert type(loaded["a"]) is float
    assert loaded["state"]._metadata == module.state_dict()._metadata
    assert loaded["key"] == "k"
    state = module.state_dict()
    assert to_primitives(state) is state  # nothing is copied without need
