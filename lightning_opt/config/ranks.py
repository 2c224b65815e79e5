"""Which ranks of a job there are on this machine, how each of them ended, and which one is to blame.

When one rank is gone the others fail in its wake, with an error that names nobody. So every rank leaves a file with
its process id in a folder that all of them see, and another one when it ends; whoever has to explain a lost job looks
there.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_opt.config.processes import is_alive, kill_all

ROOM = "LIGHTNING_OPT_RANKS"  # set by a process that supervises the ranks and speaks for them
FOLDER = "folder"  # names the run folder, in the same place
STOPPED = (0, 75, 130, 143)  # done, or asked to stop: nobody's fault
_OF_ONE_START = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)
_HANGS = "hangs: it did not answer within the timeout"
_TIMEOUT = re.compile(r"time(d |)out", re.IGNORECASE)
_POLL_S = 0.1
_here: "Ranks | None" = None


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rank ended.

    Attributes:
        code: Its exit code.
        said: What it has to tell the user, at most three lines.
        trace: The traceback of an error that nobody foresaw, else "".
        lost_peer: Whether it ended because another rank did not answer.
        at: When, in seconds.
    """

    code: int
    said: str = ""
    trace: str = ""
    lost_peer: bool = False
    at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Guilty:
    """The rank that ended a job; `ending` is None where it could not say anything itself."""

    rank: int
    what: str
    ending: Ending | None = None


class Ranks:
    """The folder in which the ranks of one start of a job tell of themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def enter(self, rank: int) -> None:
        """Say which process this rank is."""
        self._file(rank, "end").unlink(missing_ok=True)
        self._file(rank, "status").unlink(missing_ok=True)
        self._write(rank, "here", {"pid": os.getpid(), "host": socket.gethostname()})

    def leave(self, rank: int, ending: Ending) -> None:
        """Say how this rank ended; the first word counts."""
        forgotten = ending.code == 0 and not self.folder.is_dir()  # by rank 0, which has seen the job's good end
        if not forgotten and not self._file(rank, "end").exists():
            self._write(rank, "end", {**asdict(ending), "at": time.time()})

    def note_status(self, rank: int, returncode: int) -> None:
        """Say how a process ended that this one has started."""
        self._write(rank, "status", {"returncode": returncode})

    def endings(self) -> dict[int, Ending]:
        """Return how each rank ended that could say so."""
        return {rank: Ending(**said) for rank, said in self._all("end").items()}

    def processes(self) -> dict[int, int]:
        """Return the process ids of the ranks on this machine."""
        host = socket.gethostname()
        return {rank: said["pid"] for rank, said in self._all("here").items() if said["host"] == host}

    def running(self) -> dict[int, int]:
        """Return the process ids of the ranks on this machine that are running."""
        return {rank: pid for rank, pid in self.processes().items() if is_alive(pid)}

    def killed(self) -> dict[int, int | None]:
        """Return the ranks of this machine that are gone without a word, with the signal where it is known."""
        endings, status = self.endings(), {rank: said["returncode"] for rank, said in self._all("status").items()}
        gone = {rank: -code for rank, code in status.items() if code < 0 and rank not in endings}
        silent = {rank for rank, pid in self.processes().items() if rank not in endings and not is_alive(pid)}
        return {**dict.fromkeys(sorted(silent - set(status))), **gone}

    def is_in_trouble(self) -> bool:
        """Tell whether a rank has failed or is gone."""
        return any(ending.code not in STOPPED for ending in self.endings().values()) or bool(self.killed())

    def guilty(self) -> Guilty | None:
        """Return the rank that ended the job: one that failed by itself, else one that was killed, else one that hangs.

        To be asked when those that can end have had the time to.
        """
        endings = self.endings()
        own = {rank: end for rank, end in endings.items() if end.code not in STOPPED and not end.lost_peer}
        if own:
            first = min(own, key=lambda rank: (rank != 0 or bool(own[rank].trace), own[rank].at))
            return Guilty(rank=first, what="failed", ending=own[first])
        timed_out = any(end.lost_peer and _TIMEOUT.search(end.said) for end in endings.values())
        # A rank that dies takes with it those that it has started; of their signal nobody knows.
        killed = sorted(self.killed().items(), key=lambda item: (item[1] is None, item[1] == signal.SIGTERM, item[0]))
        for rank, number in killed:
            return Guilty(rank=rank, what=_HANGS if timed_out and number is None else _by(number))
        for rank in sorted(set(self.running()) - set(endings)):
            return Guilty(rank=rank, what=_HANGS)
        lost = {rank: end for rank, end in endings.items() if end.lost_peer}
        if lost:  # each misses another: they did not find each other, or one of another machine is gone
            return Guilty(rank=min(lost), what="lost another rank", ending=lost[min(lost)])
        return None

    def end(self, rank: int) -> None:
        """Kill a rank of this machine that does not end by itself."""
        if (pid := self.running().get(rank)) is not None:
            kill_all([pid])

    def wait_for_others(self, *, seconds: float) -> None:
        """Wait until every other rank of this machine has ended or said how it will, at most so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and set(self.running()) - set(self.endings()):
            time.sleep(_POLL_S)

    def _file(self, rank: int, kind: str) -> Path:
        return self.folder / f"{rank}.{kind}"

    def _write(self, rank: int, kind: str, said: dict[str, object]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._file(rank, f"{kind}.{os.getpid()}.part")
        part.write_text(json.dumps(said), encoding="utf-8")
        part.replace(self._file(rank, kind))

    def _all(self, kind: str) -> dict[int, dict[str, Any]]:
        found = {}
        for path in self.folder.glob(f"*.{kind}"):
            if path.stem.isdigit():
                found[int(path.stem)] = json.loads(path.read_text(encoding="utf-8"))
        return found


def here() -> Ranks | None:
    """Return where this process and its peers tell of themselves; None for a job of one process."""
    return Ranks(Path(os.environ[ROOM])) if is_supervised() else _here


def is_supervised() -> bool:
    """Tell whether another process watches this one and says how the job ended."""
    return ROOM in os.environ


def enter(folder: Path, *, rank: int, processes: int) -> None:
    """Take part in the job of a run folder, one of so many processes."""
    global _here
    if not is_supervised():
        start = "-".join(os.environ.get(name, "") for name in _OF_ONE_START)
        room = folder / ".ranks" / hashlib.sha256(start.encode()).hexdigest()[:12]
        _here = Ranks(room) if processes > 1 else None
    if (ranks := here()) is not None:
        ranks.enter(rank)
        if rank == 0:
            (ranks.folder / FOLDER).write_text(str(folder), encoding="utf-8")


def forget(folder: Path) -> None:
    """Remove what the ranks of a job said that ended well."""
    shutil.rmtree(folder / ".ranks", ignore_errors=True)


def newest_guilty(folder: Path) -> Guilty | None:
    """Return the rank that ended the latest start of a run folder's job, if its ranks could say."""
    rooms = sorted((folder / ".ranks").glob("*"), key=lambda room: room.stat().st_mtime)
    return Ranks(rooms[-1]).guilty() if rooms else None


def _by(number: int | None) -> str:
    if number is None:
        return "is gone without a word"
    name = signal.Signals(number).name if number in signal.valid_signals() else "unknown"
    often = "; a machine short of memory does that" if number == signal.SIGKILL else ""
    return f"was killed by signal {number} ({name}{often})"
