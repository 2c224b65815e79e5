"""The errors that a user can cause, each with the exit code that a script can rely on.

Raise them with one sentence that names the key, file, step or rank, and what to do about it. The command line prints
that sentence and exits with the code; a traceback is kept for bugs of ours.
"""

from typing import ClassVar


class LightningOptError(Exception):
    """Base of every error whose message is meant for the user."""

    exit_code: ClassVar[int] = 1


class ConfigError(LightningOptError):
    """A key, a value or a combination that cannot work (exit 2)."""

    exit_code = 2


class NoCheckpointError(LightningOptError):
    """No checkpoint that can be trusted is left (exit 3)."""

    exit_code = 3


class StorageError(LightningOptError):
    """A file could not be read or written (exit 4)."""

    exit_code = 4


class NonFiniteError(LightningOptError):
    """A loss, gradient or statistic is NaN or infinite (exit 5)."""

    exit_code = 5


class OutOfMemoryError(LightningOptError):
    """The device or host ran out of memory (exit 6)."""

    exit_code = 6


class PeerLostError(LightningOptError):
    """Another rank of the job is gone (exit 7)."""

    exit_code = 7


class UntrustedInputError(LightningOptError):
    """An artifact from elsewhere asks for code to be run (exit 8)."""

    exit_code = 8


class MissingExtraError(ConfigError):
    """An optional package is not installed (exit 2); the message holds the line that installs it."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(f"{needed_for} needs {package}: pip install 'lightning_opt[{extra}]'")
