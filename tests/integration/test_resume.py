"""The same command with the same run_dir goes on, and ends as if nothing had happened, to the last bit."""

import importlib.util
import shutil
import signal

import pytest
from warm import ROOT, Started, wait_for, warm

from lightning_opt.reporting import read_record

spec = importlib.util.spec_from_file_location("resume_kill", ROOT / "experiments" / "resume_kill" / "run.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)
# The study's own job: dropout, augmentation, projectors, a schedule, checkpoints inside epochs; shorter.
JOB = [*study.JOB, "teacher.train.max_epochs=2", "trainer.max_epochs=3"]


def go(folder, cache):
    return warm(*JOB, f"run_dir={folder}", cwd=folder.parent, cache=cache)


def start(folder, cache):
    return Started([*JOB, f"run_dir={folder}"], cwd=folder.parent, cache=cache)


def student_of(folder):
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, and the cache with its teacher."""
    place = tmp_path_factory.mktemp("whole")
    out = go(place / "run", place / "cache")
    assert out.returncode == 0, out.stderr
    return place


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """A run that was asked to stop while its student was trained, and how it ended."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    process = start(folder, whole / "cache")
    wait_for(student_of(folder).exists, process=process)
    process.signal(signal.SIGTERM)
    return folder, process.end()


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of the stopped run, to go on with."""
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    return folder


@pytest.mark.support(method=["supervised", "distil_logit", "distil_feature"], strategy="one", feature="resume")
def test_killed_in_every_stage_ends_bit_equal(whole, tmp_path):
    """SIGKILL while the teacher, the student alone and the distilled student are trained."""
    folder, cache = tmp_path / "run", tmp_path / "cache"

    def in_teacher():
        return list(cache.glob("teachers/*/checkpoints/last.ckpt"))

    stages = {
        "teacher": (in_teacher, lambda: list(cache.glob("teachers/*/fit.json"))),
        "baseline": (student_of(folder / "baseline").exists, (folder / "baseline" / "fit.json").exists),
        "student": (student_of(folder).exists, (folder / "fit.json").exists),
    }
    for name, (has_begun, has_ended) in stages.items():
        process = start(folder, cache)
        wait_for(has_begun, process=process)
        process.signal(signal.SIGKILL)
        assert process.end().returncode == -signal.SIGKILL
        assert not has_ended(), f"{name} was over before it was killed: the test tests nothing"
        assert read_record(folder)["status"] == "running"
    out = go(folder, cache)
    assert out.returncode == 0, out.stderr
    assert "distilled student: going on from" in out.stderr
    assert study.differences(whole / "run", folder) == []
    assert read_record(folder)["status"] == "finished"


def test_comparison_tells_another_seed(whole, tmp_path):
    out = warm(*JOB, "seed=2", f"run_dir={tmp_path / 'run'}", cwd=tmp_path, cache=whole / "cache")
    assert out.returncode == 0, out.stderr
    assert study.differences(whole / "run", tmp_path / "run")


def test_sigterm_saves_says_so_and_the_same_command_finishes(stopped, again, whole):
    folder, out = stopped
    assert out.returncode == 143, out.stderr
    assert read_record(folder)["status"] == "interrupted"
    assert "Traceback" not in out.stderr
    assert "goes on" in out.stderr
    assert not (folder / "fit.json").exists()
    end = go(again, whole / "cache")
    assert end.returncode == 0, end.stderr
    assert study.differences(whole / "run", again) == []
    assert read_record(again)["started"] == read_record(folder)["started"]


def test_damaged_checkpoint_is_named_once_and_the_one_before_it_used(again, whole):
    last = student_of(again)
    assert last.with_name("previous.ckpt").exists(), "there is nothing to fall back on"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink()  # it may share its bytes with previous.ckpt
    last.write_bytes(content)
    out = go(again, whole / "cache")
    assert out.returncode == 0, out.stderr
    assert len([line for line in out.stderr.splitlines() if "last.ckpt is damaged" in line]) == 1
    assert "going on from previous.ckpt" in out.stderr
    assert study.differences(whole / "run", again) == []


def test_no_good_checkpoint_left_is_an_end_not_a_fresh_start(again, whole):
    for path in (again / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in (again / "checkpoints").iterdir()}
    out = go(again, whole / "cache")
    assert out.returncode == 3, out.stderr
    assert "Traceback" not in out.stderr
    error = out.stderr[out.stderr.index("lightning-opt: ") :].strip().splitlines()
    assert len(error) <= 3
    assert "last.ckpt" in error[0]
    assert {path: path.read_bytes() for path in (again / "checkpoints").iterdir()} == before
    assert not (again / "fit.json").exists()
