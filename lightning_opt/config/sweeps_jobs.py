"""One job of a sweep and how it ended, read from its run folder whoever ran it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.config.sweeps import Point
from lightning_opt.errors import StorageError
from lightning_opt.reporting.record import read_record, update_record, write_durably
from lightning_opt.reporting.sweeps import measures_of

# In the run folder, where a sweep and the callback that stops a trial leave words for each other.
TRIAL, PRUNED = ".hydra/trial.json", ".hydra/pruned.json"
FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "pruned", "failed", "unfinished"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A point of the space and where its run lies.

    Attributes:
        number: Its place in the sweep, or the number of its trial.
        point: What each axis is set to.
        folder: The run folder, whose name comes from the point.
    """

    number: int
    point: Point
    folder: Path

    @property
    def label(self) -> str:
        """Return what sets it apart, for a person."""
        return " ".join(f"{key}={value}" for key, value in self.point.items()) or self.folder.name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: "finished", "pruned", "failed" or "unfinished".
        values: The objectives in order; empty unless it finished.
        error: Why it failed.
        exit_code: What its process said, or would have said.
    """

    status: str
    values: tuple[float, ...] = ()
    error: str | None = None
    exit_code: int = 0

    @property
    def is_final(self) -> bool:
        """Tell whether there is nothing left to do for this job."""
        return self.status in (FINISHED, STOPPED)


def outcome_of(folder: Path, objectives: Sequence[str], error: BaseException | None = None) -> Outcome:
    """Read how a job ended.

    Args:
        folder: Its run folder, which may not be there yet.
        objectives: Names of the values to read.
        error: What its launcher caught, for a job that left no record of it.
    """
    if (folder / PRUNED).is_file():
        return Outcome(status=STOPPED)
    record = _record(folder)
    if record is not None and record["status"] == "finished":
        return _finished(record, objectives)
    if error is not None:
        stopped = record is not None and record["status"] == "interrupted"
        code: int = getattr(error, "code", 0) or getattr(error, "exit_code", 1)
        return Outcome(status=UNFINISHED if stopped else FAILED, error=_one_line(error), exit_code=code)
    if record is not None and record["status"] == "failed":
        return Outcome(status=FAILED, error=record.get("error") or "failed", exit_code=1)
    return Outcome(status=UNFINISHED)


def _finished(record: Mapping[str, Any], objectives: Sequence[str]) -> Outcome:
    known = measures_of(record)
    absent = [name for name in objectives if known.get(name) is None]
    if absent:
        there = ", ".join(name for name, value in known.items() if value is not None)
        said = f"objective={absent[0]}: this run has no such value; it has {there}"
        return Outcome(status=FAILED, error=said, exit_code=2)
    return Outcome(status=FINISHED, values=tuple(float(known[name] or 0.0) for name in objectives))


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return read_record(folder)
    except StorageError:
        return None


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def write_trial(folder: Path, facts: Mapping[str, Any]) -> None:
    """Tell the callback inside a job which trial it belongs to."""
    place = folder / TRIAL
    place.parent.mkdir(parents=True, exist_ok=True)
    write_durably(place, json.dumps(dict(facts), indent=2))


def mark_stopped(folder: Path) -> None:
    """Let the record of a job that was stopped early say so: it neither failed nor waits to be resumed."""
    said = json.loads((folder / PRUNED).read_text(encoding="utf-8"))
    record = _record(folder)
    if record is not None and record["status"] == "failed":
        update_record(folder, {"status": "interrupted", "error": f"pruned: {said['reason']}"})
