"""Processes of this machine: who descends from whom, and how none is left behind."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_S = 1.0
_ROUNDS = 100


def die_with_parent() -> None:
    """Let the system kill this process when the one that started it is gone; where it cannot, a thread looks."""
    parent = os.getppid()
    if _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return
    threading.Thread(target=_look_after, args=(parent,), daemon=True, name="parent-watch").start()


def adopt_orphans(yes: bool) -> None:
    """Become the parent of descendants whose own parent is gone (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(yes))


def descendants(pid: int) -> list[int]:
    """Return the processes below one, nearest first (Linux; elsewhere none)."""
    below: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        except OSError:  # it has just ended
            continue
        below[int(parent)].append(int(folder.name))
    found = list(below[pid])
    for child in found:
        found += below[child]
    return found


def kill_all(pids: list[int]) -> None:
    """Kill processes that may be gone already."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def end_descendants(*, spared: Collection[int] = ()) -> None:
    """Kill what descends from this process, until nothing does, and reap it.

    Args:
        spared: Children that are left alone, with all below them.
    """
    kept = {below for pid in spared for below in [pid, *descendants(pid)]}
    for _ in range(_ROUNDS):
        found = [pid for pid in descendants(os.getpid()) if pid not in kept]
        if not found:
            return
        kill_all(found)
        for pid in found:
            status_of(pid)
        time.sleep(0.02)


def status_of(pid: int) -> int | None:
    """Return the exit code of a child that has ended, or the signal as a negative number; None while it runs."""
    try:
        done, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if done else None


def is_alive(pid: int) -> bool:
    """Tell whether a process of this machine exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        if Path("/proc/self/stat").exists():
            return False
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return True
    return state not in "ZX"


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _look_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
