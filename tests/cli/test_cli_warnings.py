"""A run's warnings are in its record; a run that did not end well has a report, and its error stays the first."""

import csv
import json
import logging
import warnings

import pytest

from lightning_opt.cli import job
from lightning_opt.cli.fitting import Interrupted
from lightning_opt.cli.log import heard, log, start_logging
from lightning_opt.errors import StorageError
from lightning_opt.reporting import model_entry, new_record, write_record

CONFIG = {"seed": 3, "task_name": "warned"}


@pytest.fixture(autouse=True)
def _logging():
    """Set logging up as a command does, inside pytest's own capture of warnings, and take it down again."""
    logging.captureWarnings(False)
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        start_logging()
        yield
        logging.captureWarnings(False)
    log.handlers[:], log.level, log.propagate = handlers, level, propagate


def recorded(folder):
    return json.loads((folder / "record.json").read_text(encoding="utf-8"))


def measured(*_):
    """Stand in for a run's stages: what they return at the least."""
    return {"models": {"student": model_entry({"quality": {"acc": 0.5}})}, "comparison": {}}


def run(folder, monkeypatch, stages, *, configured=()):
    monkeypatch.setattr(job, "_stages", stages)
    return job._recorded(CONFIG, folder, ["train.py"], list(configured))


def test_python_warnings_reach_the_record_once_and_as_one_line(tmp_path, monkeypatch):
    def stages(*_):
        for _ in range(3):
            warnings.warn("the learning rate\n  is odd", UserWarning, stacklevel=1)
        warnings.warn("another", DeprecationWarning, stacklevel=1)
        log.warning("warning: ours")
        log.info("no warning")
        return measured()

    run(tmp_path, monkeypatch, stages, configured=["from the config"])
    assert recorded(tmp_path)["warnings"] == ["from the config", "the learning rate", "another", "ours"]
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "- the learning rate\n" in report


def test_the_first_fifty_are_kept(tmp_path, monkeypatch):
    def stages(*_):
        for place in range(80):
            warnings.warn(f"number {place}", UserWarning, stacklevel=1)
        return measured()

    run(tmp_path, monkeypatch, stages)
    assert recorded(tmp_path)["warnings"] == [f"number {place}" for place in range(50)]


def test_what_is_warned_of_outside_is_not_heard():
    lines = []
    with heard(lines):
        warnings.warn("inside", UserWarning, stacklevel=1)
    warnings.warn("outside", UserWarning, stacklevel=1)
    assert lines == ["inside"]


def test_warnings_of_a_run_that_failed_are_kept_when_it_goes_on(tmp_path, monkeypatch):
    def fails(*_):
        warnings.warn("before the crash", UserWarning, stacklevel=1)
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        run(tmp_path, monkeypatch, fails)
    assert recorded(tmp_path)["warnings"] == ["before the crash"]
    run(tmp_path, monkeypatch, measured)
    assert recorded(tmp_path)["status"] == "finished"
    assert recorded(tmp_path)["warnings"] == ["before the crash"]


def began_to_train(folder):
    """Leave what a fit has left when it is stopped at step 39: curves and a checkpoint, and a control that is done."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "baseline").mkdir()
    facts = {"quality": {"acc": 0.912}, "steps": 60}
    (folder / "baseline" / "fit.json").write_text(json.dumps(facts), encoding="utf-8")
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "train/loss", "val/acc"])
        writer.writeheader()
        for step in range(9, 40, 10):
            writer.writerow({"epoch": step // 20, "step": step, "train/loss": 1 / (step + 1)})
        writer.writerow({"epoch": 1, "step": 39, "val/acc": 0.875})


def test_a_failed_run_has_a_report_that_says_how_far_it_came(tmp_path, monkeypatch):
    def fails(*_):
        began_to_train(tmp_path)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run(tmp_path, monkeypatch, fails)
    assert recorded(tmp_path)["status"] == "failed"
    report = (tmp_path / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert "RuntimeError: no more" in report
    assert "came as far as step 39 (epoch 1), where val/acc was last 0.875" in report
    assert "a checkpoint to resume from is there" in report
    assert "The model alone is fully trained (60 steps, test acc 0.912)" in report
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "figures" / "losses.png").is_file()


def test_an_interrupted_run_has_one_too(tmp_path, monkeypatch):
    def stops(*_):
        raise Interrupted("student: stopped by a signal at step 7; state saved")

    with pytest.raises(SystemExit) as stop:
        run(tmp_path, monkeypatch, stops)
    assert stop.value.code == 143
    assert recorded(tmp_path)["status"] == "interrupted"
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "was interrupted" in report
    assert "No training step was logged" in report


@pytest.mark.parametrize("broken", ["render", "write_record"])
def test_a_report_that_fails_hides_nothing(tmp_path, monkeypatch, broken):
    def fails(*_):
        def breaks(*_):
            raise StorageError("the disk is full")

        monkeypatch.setattr(job, broken, breaks)
        raise ZeroDivisionError("the first error")

    with pytest.raises(ZeroDivisionError, match="the first error"):
        run(tmp_path, monkeypatch, fails)


def test_a_finished_run_says_nothing_of_how_far_it_came(tmp_path, monkeypatch):
    began_to_train(tmp_path)
    write_record(tmp_path, new_record("train.py", seed=3, config_sha256=None))
    run(tmp_path, monkeypatch, measured)
    assert "came as far" not in (tmp_path / "report.md").read_text(encoding="utf-8")
