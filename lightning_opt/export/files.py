"""Write files so that a power cut leaves the old one or the new one, never half of it; hash them; read them back."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning_opt.errors import StorageError


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and put it in place.

    Raises:
        StorageError: The file could not be written; what was at `path` before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    with storing(path):
        try:
            write(temporary)
            publish(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def publish(source: Path, target: Path) -> None:
    """Flush a finished file to disk and rename it to `target` on the same file system."""
    source.chmod(0o644)  # safetensors makes files that only their owner may read
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    source.replace(target)
    _sync_folder(target.parent)


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into one sentence that names `path`.

    Raises:
        StorageError: In place of the system's error.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} could not be written: {error}; free some space or choose another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a small text file durably.

    Raises:
        StorageError: The file could not be written.
    """
    write_durably(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, if they are not there.

    Raises:
        StorageError: It cannot be made.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def read_bytes(path: Path, *, limit_bytes: int) -> bytes:
    """Read a regular file of at most `limit_bytes`.

    Raises:
        StorageError: It is missing, no regular file, unreadable or too large.
    """
    if not path.is_file():
        raise StorageError(f"{path} is missing; the folder is not a complete artifact")
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise StorageError(f"{path} has {size} bytes; at most {limit_bytes} are read")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex.

    Raises:
        StorageError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows has no folder handles; the rename is all there is
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
