"""Signals that ask a run to stop: what follows from one waits for the next safe moment.

Inside a fit a handler only sets a flag, and the state is saved at the next batch end. Outside of fits everything that
matters is on the disk already, and the run ends where it stands. Either way it ends with a code that says what to do:
`128 + 15` after SIGTERM, and `EX_TEMPFAIL` (75: try again) after SIGUSR1, by which a scheduler announces the end of a
job's time. SLURM starts a job again that ends so if its administrator put it into `RequeueExit`.
"""

import os
import signal
import time
from collections.abc import Sequence
from types import FrameType, MethodType
from typing import Any

TRY_AGAIN = os.EX_TEMPFAIL
STOPPING = (signal.SIGTERM, signal.SIGUSR1)
_ALL_HEAR_WITHIN_S = 1.0  # a scheduler signals one rank after the other
_heard: int | None = None


def exit_code_after(number: int) -> int:
    """Return the exit code of a run that a signal stopped."""
    return TRY_AGAIN if number == signal.SIGUSR1 else 128 + number


def heard() -> int:
    """Return the signal that has stopped this process or, of several ranks, one of the others: then SIGTERM is meant.

    Ranks decide together to stop, perhaps before the signal that one of them has heard reaches this one.
    """
    until = time.monotonic() + _ALL_HEAR_WITHIN_S
    while _heard is None and time.monotonic() < until:
        time.sleep(0.01)
    return signal.SIGTERM if _heard is None else _heard


class SignalFlag:
    """Sets a flag when one of some signals arrives, in place of what else would happen.

    Nothing is done inside the handler: a checkpoint from there would be half of a step, or hang. Signals that would
    end the run at once (see `EndNow`) are taken over as well.

    Args:
        signals: Numbers of the signals.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self.signals = tuple(signals)
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def catch(self) -> None:
        """Take the signals over (from the main thread only: elsewhere its owner handles them)."""
        self.received = None
        ending = [number for number in STOPPING if isinstance(_owner(signal.getsignal(number)), EndNow)]
        for number in dict.fromkeys([*self.signals, *ending]):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:
                return

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _remember(self, number: int, _: FrameType | None) -> None:
        global _heard
        self.received = _heard = number


class EndNow:
    """Ends the process in order when a signal asks for it, for spans in which there is nothing to save.

    Example:
        >>> with EndNow():
        ...     pass  # build, measure, write a report
    """

    def __init__(self, signals: Sequence[int] = STOPPING) -> None:
        self.signals = tuple(signals)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "EndNow":
        global _heard
        _heard = None
        for number in self.signals:
            try:
                self._before[number] = signal.signal(number, self._end)
            except ValueError:  # not in the main thread: its owner handles them
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _end(self, number: int, _: FrameType | None) -> None:
        raise SystemExit(exit_code_after(number))


def _owner(handler: Any) -> Any:
    return handler.__self__ if isinstance(handler, MethodType) else None
