"""Files that are whole or not there: temporary file, fsync, manifest, rename, and the checks that go with them.

Each file has a manifest `<name>.json` beside it with its size and sha256. A new version is announced in the manifest
*before* it replaces the old one, and the old one is struck out *afterwards*: a kill at any instant leaves a file that
its manifest knows.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_opt.checkpointing.digest import CheckpointDamagedError, sha256_of
from lightning_opt.checkpointing.index import is_index, read_index, verify_shards
from lightning_opt.errors import StorageError

__all__ = [
    "CheckpointDamagedError",
    "Entry",
    "HashingSink",
    "Manifest",
    "entry_in_place",
    "free_bytes",
    "fsync_folder",
    "keep_a_copy",
    "manifest_path",
    "publish",
    "read_manifest",
    "remove",
    "require_free_space",
    "sha256_of",
    "storage_errors",
    "sweep_stale_temps",
    "verify",
    "verify_file",
    "write_durably",
    "write_manifest",
]

MANIFEST_VERSION = 1
_TEMP = re.compile(r"^\.(?P<name>.+)\.tmp\.(?P<pid>\d+)\.[0-9a-f]+$")
_CHUNK_BYTES = 1 << 20
_active_temps: set[str] = set()


@dataclass(frozen=True)
class Entry:
    """One version of a file: what it must be to be whole, and how far the run was when it was written."""

    size: int
    sha256: str
    step: int
    epoch: int


@dataclass(frozen=True)
class Manifest:
    """What is known of a file: the newest version, the one that it replaces, and whether it is in place yet."""

    entry: Entry
    replaces: Entry | None = None
    published: bool = True

    @property
    def entries(self) -> list[Entry]:
        """The versions that may be in place."""
        return [self.entry] if self.replaces is None else [self.entry, self.replaces]


class HashingSink:
    """A file to write to that hashes and counts, and keeps its first failure instead of raising it.

    `torch.save` cannot be left by an exception half-way without more trouble, and what it goes on to write tells how
    many bytes are needed.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._hash = descriptor, hashlib.sha256()
        self.size, self.failure = 0, None  # type: tuple[int, OSError | None]

    def write(self, data: Any) -> int:
        """Write bytes and return how many."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self.failure is None:
            try:
                _write_all(self._descriptor, view)
                self._hash.update(view)
            except OSError as error:
                self.failure = error
        return len(view)

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def hexdigest(self) -> str:
        """Return the sha256 of all that was written."""
        return self._hash.hexdigest()


def write_durably(
    path: Path,
    write: Callable[[HashingSink], None],
    *,
    step: int = 0,
    epoch: int = 0,
    before_publish: Callable[[], None] | None = None,
) -> Entry:
    """Write a file so that at any instant the old or the new version is whole, and announce it in its manifest.

    Args:
        path: Its place.
        write: Writes its content.
        step: How far the run is, for the manifest.
        epoch: Likewise.
        before_publish: Called when the new version is whole on the disk and the old one still in its place.

    Raises:
        StorageError: If the disk is full or fails; the previous version is intact and nothing is left behind.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _temp_beside(path) as temp:
        with storage_errors(path):
            descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        sink = HashingSink(descriptor)
        try:
            write(sink)
            with storage_errors(path, needed_bytes=lambda: sink.size):
                if sink.failure is not None:
                    raise sink.failure
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        entry = Entry(size=sink.size, sha256=sink.hexdigest(), step=step, epoch=epoch)
        if before_publish is not None:
            before_publish()
        publish(temp, path, entry=entry)
    return entry


def publish(source: Path, path: Path, *, entry: Entry) -> None:
    """Move a whole, durable file to its place; see the module's first words for the order.

    Raises:
        StorageError: If the manifest or the file cannot be written.
    """
    with storage_errors(path, needed_bytes=lambda: entry.size):
        write_manifest(path, Manifest(entry=entry, replaces=entry_in_place(path), published=False))
        os.replace(source, path)
        fsync_folder(path.parent)
        write_manifest(path, Manifest(entry=entry))


def keep_a_copy(path: Path, *, as_path: Path) -> None:
    """Give a whole file a second name, without a moment in which neither is there.

    Raises:
        StorageError: If that is impossible.
    """
    entry = entry_in_place(path)
    if entry is None:
        return
    if is_index(path) and path.parent != as_path.parent:
        raise ValueError(f"{path} needs the files beside it: its copy must be in the same folder, not {as_path.parent}")
    with _temp_beside(as_path) as temp, storage_errors(as_path):
        try:
            os.link(path, temp)
        except OSError:  # no hard links here: for a moment only the older name is there, which is as good
            publish(path, as_path, entry=entry)
        else:
            publish(temp, as_path, entry=entry)


def remove(path: Path) -> None:
    """Remove a file and its manifest such that no kill makes it look lost."""
    with storage_errors(path):
        if (manifest := read_manifest(path)) is not None:
            write_manifest(path, Manifest(entry=manifest.entry, published=False))
        path.unlink(missing_ok=True)
        manifest_path(path).unlink(missing_ok=True)
        fsync_folder(path.parent)


def verify(path: Path) -> Entry:
    """Check a file against its manifest, and all files of a sharded checkpoint; return the entry that it matches.

    Raises:
        CheckpointDamagedError: Naming the file and the reason.
        UntrustedInputError: A sharded checkpoint points outside its folder.
    """
    entry = verify_file(path)
    if is_index(path):
        verify_shards(path, read_index(path))
    return entry


def verify_file(path: Path) -> Entry:
    """Check one file against its manifest and return the entry that it matches.

    Raises:
        CheckpointDamagedError: Naming the file and the reason.
    """
    if not path.is_file():
        raise CheckpointDamagedError(f"{path} is missing")
    manifest = read_manifest(path)
    if manifest is None:
        raise CheckpointDamagedError(f"{path} cannot be trusted: its manifest {manifest_path(path).name} is missing")
    size = path.stat().st_size
    if size not in {entry.size for entry in manifest.entries}:
        raise CheckpointDamagedError(f"{path} is damaged: {size} bytes instead of {manifest.entry.size}")
    digest = sha256_of(path)
    for entry in manifest.entries:
        if entry.size == size and entry.sha256 == digest:
            return entry
    raise CheckpointDamagedError(f"{path} is damaged: its content does not match its sha256")


def entry_in_place(path: Path) -> Entry | None:
    """Return the entry of the version that is in place, as far as the manifest tells (no file or manifest: None)."""
    try:
        manifest = read_manifest(path)
        if manifest is None or not path.is_file():
            return None
        return manifest.entry if manifest.published else verify(path)
    except CheckpointDamagedError:
        return None


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a file is."""
    return path.with_name(f"{path.name}.json")


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a file, or None if it has none.

    Raises:
        CheckpointDamagedError: If the manifest itself cannot be read.
    """
    try:
        said = json.loads(manifest_path(path).read_text("utf-8"))
        replaces = Entry(**said["replaces"]) if said["replaces"] else None
        return Manifest(entry=Entry(**said["entry"]), replaces=replaces, published=bool(said["published"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamagedError(f"{path}: its manifest {manifest_path(path).name} is damaged") from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a file durably."""
    said = {"version": MANIFEST_VERSION, "file": path.name, **asdict(manifest)}
    place = manifest_path(path)
    with _temp_beside(place) as temp:
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write_all(descriptor, memoryview((json.dumps(said, indent=1) + "\n").encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temp, place)
    fsync_folder(place.parent)


def require_free_space(folder: Path, *, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        StorageError: Naming the needed and the free bytes.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise StorageError(
            f"{folder}: checkpoints need about {needed_bytes} bytes, {free} are free: free some space or choose "
            "another run_dir"
        )


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sweep_stale_temps(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes left in a folder, and return them."""
    swept = []
    for path in folder.glob(".*.tmp.*") if folder.is_dir() else ():
        match = _TEMP.match(path.name)
        if match and str(path) not in _active_temps and not _is_another_process(int(match["pid"])):
            path.unlink(missing_ok=True)
            swept.append(path)
    return swept


@contextlib.contextmanager
def storage_errors(path: Path, *, needed_bytes: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn an operating system's error into one sentence with the needed and the free bytes.

    Raises:
        StorageError: Instead of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        needed = f"{needed_bytes()} bytes needed, " if needed_bytes is not None else ""
        raise StorageError(
            f"{path} could not be written ({error.strerror or error}): {needed}{free_bytes(path.parent)} bytes free; "
            "the previous version is intact"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temp_beside(path: Path) -> Iterator[Path]:
    temp = path.with_name(f".{path.name}.tmp.{os.getpid()}.{secrets.token_hex(4)}")
    _active_temps.add(str(temp))
    try:
        yield temp
    finally:
        with contextlib.suppress(OSError):  # a rename onto a second name of the same file leaves the first one
            temp.unlink(missing_ok=True)
        _active_temps.discard(str(temp))


def _write_all(descriptor: int, view: memoryview) -> None:
    for start in range(0, len(view), _CHUNK_BYTES):
        chunk = view[start : start + _CHUNK_BYTES]
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]


def _is_another_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
