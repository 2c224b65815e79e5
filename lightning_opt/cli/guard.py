"""From an error to an exit code and at most three lines that a person can act on."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

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
_PEER_WORDS = ("connection closed by peer", "connection reset by peer", "timed out waiting", "gloo", "nccl")


def guarded(run: Callable[[], int], *, debug: bool = False) -> int:
    """Call `run` and turn what a user can cause into its exit code; bugs of ours keep their traceback.

    Args:
        run: The command.
        debug: Show the traceback of every error.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted; the same command with the same run_dir goes on from here", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        known = as_known(error)
        if known is None or debug:
            traceback.print_exc()
        if known is None:
            return 1
        lines = str(known).strip().splitlines()[:3]
        print("\n".join([f"lightning-opt: {lines[0]}", *lines[1:]]), file=sys.stderr)
        return known.exit_code


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
    if isinstance(error, RuntimeError) and any(word in text.lower() for word in _PEER_WORDS):
        rank = os.environ.get("LOCAL_RANK", "0")
        return PeerLostError(f"rank {rank} lost another rank of this job ({_line(text)}); the same command resumes")
    if type(error).__name__ == "MisconfigurationException" or (
        isinstance(error, ValueError) and "`val_check_interval`" in text  # known only when the batches are counted
    ):
        return ConfigError(f"trainer: {_line(text)}")
    if type(error).__name__ == "DetectAnomalyError":
        return NonFiniteError(text)
    return None


def _line(text: str) -> str:
    first = text.strip().splitlines()[0] if text.strip() else "no details"
    return first if len(first) <= 160 else f"{first[:157]}..."
