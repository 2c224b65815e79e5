"""From an error to an exit code and at most three lines that a person can act on."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from lightning_opt.config import launch, ranks
from lightning_opt.config.ranks import Ending
from lightning_opt.errors import (
    ConfigError,
    LightningOptError,
    NonFiniteError,
    OutOfMemoryError,
    PeerLostError,
    StorageError,
)

INTERRUPTED = 130
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "application timeout caused pair closure",
    "gloo",
    "nccl",
)
_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_LAST_WORDS_S = 5.0  # in which the other ranks end, so that the one that cannot is known


def guarded(run: Callable[[], int], *, debug: bool = False) -> int:
    """Call `run` and turn what a user can cause into its exit code; bugs of ours keep their traceback.

    Args:
        run: The command.
        debug: Show the traceback of every error.
    """
    try:
        return _left(Ending(code=run()))
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's way to hand it on
            return _interrupted()
        _left(Ending(code=end.code if isinstance(end.code, int) else int(end.code is not None)))
        raise
    except Exception as error:
        return _left(ending_of(error, debug=debug))


def _interrupted() -> int:
    if launch.rank() == 0 and not ranks.is_supervised():
        print("interrupted; the same command with the same run_dir goes on from here", file=sys.stderr)
    return _left(Ending(code=INTERRUPTED))


def ending_of(error: BaseException, *, debug: bool = False) -> Ending:
    """Return an error's exit code and what to tell the user."""
    known = as_known(error)
    trace = "".join(traceback.format_exception(error)) if known is None or debug else ""
    if known is None:
        return Ending(code=1, said=f"{type(error).__name__}: {_line(str(error))}", trace=trace)
    lines = str(known).strip().splitlines()[:3]
    return Ending(code=known.exit_code, said="\n".join(lines), trace=trace, lost_peer=isinstance(known, PeerLostError))


def note(error: BaseException) -> None:
    """Tell whoever watches the ranks of an error at once; what is still to be written may take a while."""
    room = ranks.here()
    if room is not None and isinstance(error, Exception):
        room.leave(launch.rank(), ending_of(error))


def as_known(error: BaseException) -> LightningOptError | None:
    """Return the error of ours that another library's error amounts to; None for a bug."""
    if isinstance(error, LightningOptError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return OutOfMemoryError(f"out of memory ({_line(text)}); use a smaller data.batch_size")
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        where = f" {error.filename}" if error.filename else ""
        return StorageError(f"cannot write{where}: {os.strerror(error.errno or 0)}; free some space or set run_root")
    if _is_of_a_peer(error, text.lower()):
        lost = f"rank {launch.rank()} lost another rank of this job ({_line(text)})"
        return PeerLostError(f"{lost}; the same command resumes")
    if type(error).__name__ == "MisconfigurationException" or (
        isinstance(error, ValueError) and "`val_check_interval`" in text  # known only when the batches are counted
    ):
        return ConfigError(f"trainer: {_line(text)}")
    if type(error).__name__ == "DetectAnomalyError":
        return NonFiniteError(text)
    return None


def _is_of_a_peer(error: BaseException, text: str) -> bool:
    if type(error).__name__ in _PEER_TYPES:
        return True
    return isinstance(error, RuntimeError) and any(word in text for word in _PEER_WORDS)


def _left(ending: Ending) -> int:
    """Say how a command ended: to whoever watches this rank, else on the terminal; return its exit code."""
    room = ranks.here()
    if room is None:
        _print(ending)
        return ending.code
    room.leave(launch.rank(), ending)
    if ranks.is_supervised():
        return ending.code
    if not ending.lost_peer:
        return _failed_alone(ending)
    return _blame(room, ending)


def _failed_alone(ending: Ending) -> int:
    """Name this rank as the one that failed; nobody else will."""
    if ending.code in ranks.STOPPED:
        return ending.code
    unforeseen = ending.code == 1
    said = f"rank {launch.rank()} failed: {ending.said}" if unforeseen else ending.said
    code = PeerLostError.exit_code if unforeseen else ending.code
    _print(Ending(code=code, said=said, trace=ending.trace))
    return code


def _blame(room: ranks.Ranks, ending: Ending) -> int:
    """Find out which rank is gone, and end the one that hangs; the lowest rank that can still speak names it."""
    room.wait_for_others(seconds=_LAST_WORDS_S)
    guilty = room.guilty()
    if guilty is not None and guilty.ending is None:
        speaks = min((rank for rank, end in room.endings().items() if end.lost_peer), default=launch.rank())
        room.end(guilty.rank)
        ending = Ending(code=ending.code, said=f"rank {guilty.rank} {guilty.what}; the same command resumes")
        if speaks != launch.rank():
            return ending.code
    elif guilty is not None and guilty.rank != launch.rank():
        return ending.code  # it speaks for itself
    _print(ending)
    return ending.code


def _print(ending: Ending) -> None:
    if ending.trace:
        print(ending.trace, end="", file=sys.stderr)
    if ending.said and (not ending.trace or ending.code != 1):
        lines = ending.said.splitlines()
        print("\n".join([f"lightning-opt: {lines[0]}", *lines[1:]]), file=sys.stderr)


def _line(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else "no details"
    return first if len(first) <= 160 else f"{first[:157]}..."
