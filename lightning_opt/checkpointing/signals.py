"""Remembers that a signal arrived; what follows from it is for the next safe moment."""

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any


class SignalFlag:
    """Sets a flag when one of some signals arrives, in place of what else would happen.

    Nothing is done inside the handler: a checkpoint from there would be half of a step, or hang.

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
        for number in self.signals:
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
        self.received = number
