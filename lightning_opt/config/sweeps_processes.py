"""Jobs of a sweep as processes of this machine that share its cores and GPUs.

Not Hydra's joblib launcher: there a job that is killed for memory takes the whole pool with it, a job in a pool's
worker cannot start the other ranks of a DDP run as its command would, and jobs on GPUs all take the first one. A
process that runs the job's own command has none of that.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lightning_opt.config.sweeps import quoted
from lightning_opt.config.sweeps_jobs import Job
from lightning_opt.errors import LightningOptError

_log = logging.getLogger("lightning_opt")
_POLL_S = 0.1
_MOST_SECONDS_TO_STOP = 120.0  # a job that is asked to stop saves its state first
_ASKED = (signal.SIGTERM, signal.SIGINT)
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class JobFailedError(LightningOptError):
    """A job's process ended with a code other than 0."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(kw_only=True)
class Processes:
    """Runs commands, several at once.

    Attributes:
        program: What comes before a job's words.
        folder: Gets `logs/<job>.txt`, what each process said.
        n_jobs: At once.
        ranks: Processes that each job has.
        threads: Of each process; None to share the cores.
        gpus: GPUs of this machine that the jobs share; 0 for none.
    """

    program: list[str]
    folder: Path
    n_jobs: int
    ranks: int = 1
    threads: int | None = None
    gpus: int = 0
    _running: dict[int, tuple[subprocess.Popen[bytes], Job]] = field(default_factory=dict)
    _stop: int = 0

    def environment(self, slot: int) -> dict[str, str]:
        """Return the variables of the job in a slot: its share of the cores, and its own GPUs where there are some."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = self.threads or max(1, cores // (self.n_jobs * self.ranks))
        given = os.environ.get("OMP_NUM_THREADS", "")
        if self.threads is None and given.isdigit():
            share = min(share, max(1, int(given)))
        variables = {"OMP_NUM_THREADS": str(share), "MKL_NUM_THREADS": str(share)}
        if self.gpus:
            named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
            there = named.split(",")
            mine = [there[(slot * self.ranks + place) % len(there)] for place in range(min(self.ranks, len(there)))]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return {**os.environ, **variables}

    def run(self, jobs: Sequence[tuple[Sequence[str], Job]]) -> list[BaseException | None]:
        """Run each job's words to their end; return what stopped each, None for those that ended well.

        Raises:
            SystemExit: This process was asked to stop; so were the jobs, and they saved their state.
        """
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        waiting, ended = list(jobs), dict[str, BaseException | None]()
        with self._listening():
            while (waiting or self._running) and not self._stop:
                for slot in range(self.n_jobs):
                    if slot not in self._running and waiting:
                        self._start(slot, *waiting.pop(0))
                ended |= self._collect()
                time.sleep(_POLL_S)
            if self._stop:
                self._end_all()
                raise SystemExit(128 + self._stop)
        return [ended[job.folder.name] for _, job in jobs]

    def _start(self, slot: int, words: Sequence[str], job: Job) -> None:
        _log.info("sweep: job %d (%s) starts", job.number, job.label)
        with self._said(job).open("ab") as said:
            process = subprocess.Popen(
                [*self.program, *words, f"run_dir={quoted(str(job.folder))}"],
                env=self.environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C comes here, and from here to the jobs
                preexec_fn=_end_with_parent,
            )
        self._running[slot] = (process, job)

    def _collect(self) -> dict[str, BaseException | None]:
        """Take the processes that have ended out of their slots."""
        ended: dict[str, BaseException | None] = {}
        for slot, (process, job) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[slot]
                ended[job.folder.name] = (
                    None
                    if code == 0
                    else JobFailedError(self._last_words(job, code), code=code if code > 0 else 128 - code)
                )
        return ended

    def _said(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.folder.name}.txt"

    def _last_words(self, job: Job, code: int) -> str:
        lines = self._said(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = next((line for line in reversed(lines) if line.startswith("lightning-opt: ")), None)
        words = last.removeprefix("lightning-opt: ") if last else (lines[-1] if lines else "it said nothing")
        return f"ended with {code}: {words}"

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Note a signal that asks this process to stop."""

        def note(number: int, frame: FrameType | None) -> None:
            self._stop = number

        before = {number: signal.signal(number, note) for number in _ASKED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end_all(self) -> None:
        """Ask every job to stop, and end those that do not."""
        for process, _ in self._running.values():
            process.terminate()
        until = time.monotonic() + _MOST_SECONDS_TO_STOP
        for process, job in self._running.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("sweep: job %d (%s) did not stop and is killed", job.number, job.label)
                os.killpg(process.pid, signal.SIGKILL)
        self._running.clear()


def _end_with_parent() -> None:
    """Let the kernel end this process when the sweep is killed: nothing else would."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
