"""A sweep that is going on: its folder, its jobs and what is known of them, in `sweep.json`."""

import fcntl
import json
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning_opt.config.sweeps import Point, Space, folder_name
from lightning_opt.config.sweeps_compose import Composer
from lightning_opt.config.sweeps_jobs import (
    FAILED,
    FINISHED,
    STOPPED,
    UNFINISHED,
    Job,
    Outcome,
    mark_stopped,
    outcome_of,
)
from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.reporting.record import timestamp, write_durably
from lightning_opt.reporting.sweeps import FILE_NAME, SCHEMA_VERSION
from lightning_opt.reporting.text import redact_words

_log = logging.getLogger("lightning_opt")
# Runs jobs and returns for each what stopped it, if anything did.
Launch = Callable[[Sequence[Job]], Sequence[BaseException | None]]


class Method(Protocol):
    """How a sweep chooses its points."""

    n_jobs: int
    threads: int | None
    launcher: str | None
    on_failure: str
    params: dict[str, Any]

    def callbacks(self, node: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the callbacks that every job gets beside its own, from the sweep's own config."""

    def check(self, sweep: "Sweep") -> None:
        """Refuse what cannot work, before anything is created."""

    def prepare(self, sweep: "Sweep") -> None:
        """Open what is needed in the sweep's folder."""

    def run(self, sweep: "Sweep", launch: Launch) -> None:
        """Run the jobs that are left."""


@dataclass(kw_only=True)
class Sweep:
    """Everything that the parts of a sweep share.

    Attributes:
        folder: Holds `sweep.json` and one run folder a job.
        space: What varies.
        method: Chooses the points.
        objectives: Names of what is optimised; empty for a grid without any.
        directions: "maximize" or "minimize" for each.
        command: The words that were typed, program first.
        composer: Makes the command line and the config of a point.
        extra: Words that jobs get and that do not belong to their point.
        jobs: Those known so far, by the name of their folder.
        outcomes: How they ended, likewise.
    """

    folder: Path
    space: Space
    method: Method
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    command: Sequence[str]
    composer: Composer
    extra: tuple[str, ...] = ()
    jobs: dict[str, Job] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def job(self, number: int, point: Point) -> Job:
        """Return the job of a point; equal points share one."""
        name = folder_name(point)
        return self.jobs.setdefault(name, Job(number=number, point=point, folder=self.folder / name))

    def run(self, jobs: Sequence[Job], launch: Launch) -> list[Outcome]:
        """Run jobs, leaving out what is done, and return how each ended."""
        self.write()
        unique = {job.folder.name: job for job in jobs}
        left = [job for job in unique.values() if not self._look(job).is_final]
        for job in unique.values():
            if job not in left:
                _log.info("sweep: job %d (%s) is done: %s", job.number, job.label, job.folder)
        errors = launch(left) if left else []
        for job, error in zip(left, errors, strict=True):
            self._look(job, error)
            self._say(job)
        self.write()
        return [self.outcomes[job.folder.name] for job in jobs]

    def _look(self, job: Job, error: BaseException | None = None) -> Outcome:
        outcome = outcome_of(job.folder, self.objectives, error)
        if outcome.status == STOPPED:
            mark_stopped(job.folder)
        self.outcomes[job.folder.name] = outcome
        return outcome

    def _say(self, job: Job) -> None:
        outcome = self.outcomes[job.folder.name]
        named = zip(self.objectives, outcome.values, strict=False)
        values = "".join(f"  {name} {value:.6g}" for name, value in named)
        words = f": {outcome.error}" if outcome.error else values
        _log.info("sweep: job %d (%s) %s%s", job.number, job.label, outcome.status, words)

    @property
    def must_stop(self) -> bool:
        """Tell whether a job failed and no other may start after that."""
        return self.method.on_failure == "stop" and any(o.status == FAILED for o in self.outcomes.values())

    @property
    def exit_code(self) -> int:
        """Return the code of the first job that did not end; 0 where all did or nobody minds."""
        if self.method.on_failure == "ignore":
            return 0
        codes = [outcome.exit_code or int(outcome.status == FAILED) for outcome in self.outcomes.values()]
        return next((code for code in codes if code), 0)

    def summary(self) -> str:
        """Say in one line how the jobs ended."""
        found = [self.outcomes[name].status if name in self.outcomes else UNFINISHED for name in self.jobs]
        counted = [(status, found.count(status)) for status in (FINISHED, STOPPED, FAILED, UNFINISHED)]
        return f"{len(found)} jobs: {', '.join(f'{count} {status}' for status, count in counted if count)}"

    def write(self) -> None:
        """Write `sweep.json`: what the sweep is, and each job's folder and values."""
        write_durably(self.folder / FILE_NAME, json.dumps(self._as_json(), indent=2) + "\n")

    def _as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "written": timestamp(),
            "command": shlex.join(redact_words(list(self.command))),
            **self._identity(),
            "jobs": [
                {
                    "folder": name,
                    "number": job.number,
                    "values": job.point,
                    "command": redact_words(self._words_of(job)),
                    "error": self.outcomes[name].error if name in self.outcomes else None,
                }
                for name, job in self.jobs.items()
            ],
        }

    def _words_of(self, job: Job) -> list[str]:
        return [*self.command[:2], *self.space.words(job.point)]

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a sweep to go on."""
        return {
            "method": type(self.method).__name__.lower(),
            "fixed": redact_words(list(self.space.fixed)),
            "axes": {axis.name: axis.text for axis in self.space.axes},
            "objectives": list(self.objectives),
            "directions": list(self.directions),
        }

    def check_same(self) -> None:
        """Refuse to go on with a folder that holds another sweep; a grid may get more values.

        Raises:
            ConfigError: Naming what differs.
        """
        place = self.folder / FILE_NAME
        if not place.is_file():
            return
        try:
            before = json.loads(place.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StorageError(f"{place} is damaged ({error}); name another sweep_dir") from error
        now = self._identity()
        if now["method"] == "grid":
            now["axes"], before["axes"] = sorted(now["axes"]), sorted(before.get("axes") or ())
        differing = [key for key, value in now.items() if before.get(key) != value]
        if differing:
            raise ConfigError(
                f"sweep_dir={self.folder} holds another sweep: {_difference(before, now, differing[0])}; give the same "
                "command to resume it, or name another folder"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Own the sweep's folder while in it.

        Raises:
            ConfigError: Another process is sweeping there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"sweep_dir={self.folder} is in use by another process; wait for it") from error
            yield


def _difference(before: dict[str, Any], now: dict[str, Any], key: str) -> str:
    old, new = before.get(key), now[key]
    if isinstance(old, list) and isinstance(new, list):
        words = [word for word in new if word not in old] or [word for word in old if word not in new]
        return f"{key} differ in {', '.join(map(str, words[:3]))}"
    return f"{key} was {old} and is {new}"
