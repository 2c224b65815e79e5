"""A job of several ranks on this machine, watched by a process that outlives any of them.

Rank 0 is a fork of this process, the other ranks are started by Lightning. When one is killed, fails or hangs, the
others cannot say which: this process can, ends what is left, and tells it in one line.
"""

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_opt.cli.guard import guarded
from lightning_opt.config import ranks
from lightning_opt.config.processes import (
    adopt_orphans,
    descendants,
    die_with_parent,
    end_descendants,
    status_of,
)
from lightning_opt.config.ranks import Guilty, Ranks
from lightning_opt.errors import LightningOptError, PeerLostError

_POLL_S = 0.1
_LAST_OF_A_GOOD_JOB_S = 20.0  # for ranks and loggers that end after rank 0
_RESULT = "result.json"
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def run_forked(run: Callable[[], Any], *, grace_s: float, debug: bool = False) -> Any:
    """Run a job whose rank 0 is a fork of this process, and return its result.

    Args:
        run: The job, as rank 0 runs it.
        grace_s: How long the other ranks may take to end when one has failed.
        debug: Show the traceback of every error.

    Raises:
        PeerLostError: A rank was killed, failed or hung.
        LightningOptError: The error of the job itself, with its own exit code.
    """
    with watched() as room:

        def start() -> int:
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _be_rank_0(run, room.folder, debug=debug)
            return pid

        _supervise(start, room, grace_s=grace_s, debug=debug)
        return json.loads((room.folder / _RESULT).read_text(encoding="utf-8"))


def run_command(command: Sequence[str], *, grace_s: float, debug: bool = False) -> None:
    """Run a job whose rank 0 is a command, for a process that is not safe to fork.

    Raises:
        PeerLostError: A rank was killed, failed or hung.
        LightningOptError: The error of the job itself, with its own exit code.
    """
    with watched() as room:
        _supervise(lambda: os.posix_spawn(command[0], tuple(command), os.environ), room, grace_s=grace_s, debug=debug)


def is_safe_to_fork() -> bool:
    """Tell whether a fork of this process could compute: the threads and devices of torch do not come along."""
    if "torch" not in sys.modules:
        return True
    import torch

    return torch.get_num_threads() == 1 and not torch.cuda._is_compiled()


def _supervise(start: Callable[[], int], room: Ranks, *, grace_s: float, debug: bool) -> None:
    """Start rank 0, wait for the job's end, and leave no process of it behind."""
    spared = descendants(os.getpid())
    try:
        with _Forwarded() as signals:
            pid = start()
            signals.to(pid)
            code = _wait(pid, room, grace_s=grace_s)
        guilty = room.guilty() if code != 0 else None
        if signals.received is not None and guilty is not None and _is_in_the_wake(guilty):
            raise SystemExit(_code_after(signals.received))  # a rank that was still starting had nothing to save
    finally:
        end_descendants(spared=spared)
    if code != 0:
        raise failure(guilty, code, folder_of(room), debug=debug)


@contextmanager
def watched() -> Iterator[Ranks]:
    """Let the ranks that are started meanwhile tell of themselves in a folder, and adopt those whose parent is gone."""
    place = tempfile.mkdtemp(prefix="lightning-opt-")  # no TemporaryDirectory: a fork of this process would remove it
    os.environ[ranks.ROOM] = place
    adopt_orphans(True)
    try:
        yield Ranks(Path(place))
    finally:
        adopt_orphans(False)
        os.environ.pop(ranks.ROOM, None)
        shutil.rmtree(place, ignore_errors=True)


def failure(guilty: Guilty | None, code: int, folder: Path | None, *, debug: bool = False) -> BaseException:
    """Return what a job that ended badly amounts to, and write into its record what it could not write itself."""
    if code == -signal.SIGINT or code == 130:
        return KeyboardInterrupt()
    if code in ranks.STOPPED and guilty is None:
        return SystemExit(code)
    error = _error_of(guilty, code, folder)
    if folder is not None:
        _finish_record(folder, error)
    ending = guilty.ending if guilty else None
    if ending is not None and ending.trace and (ending.code == 1 or debug):
        print(ending.trace, end="", file=sys.stderr)
    return error


def folder_of(room: Ranks) -> Path | None:
    """Return the job's run folder, once rank 0 has one."""
    said = room.folder / ranks.FOLDER
    return Path(said.read_text(encoding="utf-8")) if said.is_file() else None


def _error_of(guilty: Guilty | None, code: int, folder: Path | None) -> LightningOptError:
    if guilty is None:
        return PeerLostError(f"the job ended with {code} and no rank says why; the same command resumes")
    ending = guilty.ending
    if ending is None:
        again = f"the same command with run_dir={folder} resumes" if folder else "the same command starts it again"
        return PeerLostError(f"rank {guilty.rank} {guilty.what}; {again}")
    if ending.code == 1:
        return PeerLostError(f"rank {guilty.rank} failed: {ending.said}")
    said = ending.said if guilty.rank == 0 else f"rank {guilty.rank}: {ending.said}"
    return _class_of(ending.code)(said)


def _class_of(code: int) -> type[LightningOptError]:
    kinds = [kind for kind in LightningOptError.__subclasses__() if kind.exit_code == code]
    return kinds[0] if kinds else LightningOptError


def _finish_record(folder: Path, error: LightningOptError) -> None:
    """Let a record that still says "running" say how the run ended."""
    from lightning_opt.reporting import finish, read_record, write_record

    try:
        record = read_record(folder)
        if record["status"] == "running":
            write_record(folder, finish(record, status="failed", error=f"{type(error).__name__}: {error}"))
    except (OSError, ValueError, LightningOptError):  # there is none yet, or the disk is full: the line says it
        return


def _be_rank_0(run: Callable[[], Any], place: Path, *, debug: bool) -> None:
    """Run the job in the fork, and end it as Python would, except for what belongs to the parent."""
    code = 1
    try:
        for number in _FORWARDED:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        die_with_parent()
        code = guarded(lambda: _run_and_keep(run, place), debug=debug)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_and_keep(run: Callable[[], Any], place: Path) -> int:
    result = run()
    (place / _RESULT).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _wait(pid: int, room: Ranks, *, grace_s: float) -> int:
    """Wait for rank 0; when a rank is in trouble, no longer than the others need to end. Return the job's exit code."""
    code: int | None = None
    trouble_since: float | None = None
    while True:
        if code is None:
            code = status_of(pid)
        now = time.monotonic()
        bad = room.is_in_trouble() or code not in (None, *ranks.STOPPED)
        if trouble_since is None and (bad or code is not None):
            trouble_since = now
        if trouble_since is not None:
            patience = grace_s if bad else _LAST_OF_A_GOOD_JOB_S
            if (code is not None and not room.running()) or now - trouble_since > patience:
                break
        time.sleep(_POLL_S)
    if code is not None and code < 0:
        room.note_status(0, code)
    if code == 0:  # all that matters is done: what a rank says while it closes down does not
        return 0
    return PeerLostError.exit_code if code is None or (bad and code in ranks.STOPPED) else code


def _is_in_the_wake(guilty: Guilty) -> bool:
    """Tell whether a rank ended because the job was asked to, for all that it says itself."""
    return guilty.ending is None or guilty.ending.lost_peer


def _code_after(number: int) -> int:
    """Return the exit code of a job that a signal stopped, as `checkpointing.signals` says, which needs Lightning."""
    return os.EX_TEMPFAIL if number == signal.SIGUSR1 else 128 + number


class _Forwarded:
    """Hands signals that ask to stop on to rank 0; Ctrl-C has reached all processes of a terminal already."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Forwarded":
        self._before = {number: signal.signal(number, self._hand_on) for number in _FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def to(self, pid: int) -> None:
        """Name the process; it is handed what came before it was there."""
        self.pid = pid
        if self.received is not None:
            self._hand_on(self.received, None)

    def _hand_on(self, number: int, _: object) -> None:
        self.received = number
        if self.pid is None:
            return
        if number != signal.SIGINT or not _in_foreground():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _in_foreground() -> bool:
    """Tell whether a terminal sends its Ctrl-C to this process's group."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False
