"""Reading single files out of archives, into memory: nothing is unpacked to disk and no link is followed."""

import hashlib
import io
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from lightning_opt.errors import StorageError

MAX_MEMBER_BYTES = 256 * 2**20

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError, NotImplementedError, RuntimeError)


def read_member(archive: str | Path, path: str, *, sha256: str, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Read one file of a zip, wheel or tar archive and check it.

    Args:
        archive: The archive's file.
        path: Full path in the archive; `outer.tar.gz!inner/file.txt` reads from an archive in the archive.
        sha256: Checksum that the file must have, in hex.
        max_bytes: Refuse a file that unpacks to more than this.

    Raises:
        StorageError: The archive is damaged; it has no such file, several of that name, or a link instead; the file is
            too large or has another checksum.
    """
    place = str(archive)
    try:
        with open(archive, "rb") as file:
            *outer, last = path.split("!")
            stream: BinaryIO = file
            for step in outer:
                stream = io.BytesIO(_read(stream, step, place=place, max_bytes=max_bytes))
                place = f"{place}!{step}"
            content = _read(stream, last, place=place, max_bytes=max_bytes)
    except _DAMAGE as error:
        raise StorageError(f"{place} is damaged or unreadable ({error}); delete it and fetch it again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise StorageError(f"{place}: {last} has sha256 {found}, not the expected {sha256}; delete {archive}")
    return content


def member_names(archive: str | Path) -> list[str]:
    """List the files of a zip archive or wheel.

    Raises:
        StorageError: The archive is damaged.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            return file.namelist()
    except _DAMAGE as error:
        raise StorageError(f"{archive} is damaged or unreadable ({error}); delete it and fetch it again") from error


def read_text_members(archive: str | Path, paths: list[str], *, max_bytes: int = MAX_MEMBER_BYTES) -> dict[str, str]:
    """Read several UTF-8 files of one archive whose own checksum has been checked.

    Raises:
        StorageError: As `read_member`; or a file is no UTF-8 text.
    """
    texts = {}
    try:
        with open(archive, "rb") as file:
            for path in paths:
                texts[path] = _read(file, path, place=str(archive), max_bytes=max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{archive}: {path} is no UTF-8 text ({error.reason} at byte {error.start})") from error
    except _DAMAGE as error:
        raise StorageError(f"{archive} is damaged or unreadable ({error}); delete it and fetch it again") from error
    return texts


def _read(stream: BinaryIO, path: str, *, place: str, max_bytes: int) -> bytes:
    """Read one file of the archive in `stream`; zip or tar is told by the content."""
    if zipfile.is_zipfile(stream):
        return _read_zip(stream, path, place=place, max_bytes=max_bytes)
    stream.seek(0)
    return _read_tar(stream, path, place=place, max_bytes=max_bytes)


def _read_zip(stream: BinaryIO, path: str, *, place: str, max_bytes: int) -> bytes:
    with zipfile.ZipFile(stream) as archive:
        found = [info for info in archive.infolist() if info.filename == path]
        _check_single(len(found), path, place)
        mode = found[0].external_attr >> 16
        if found[0].is_dir() or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
            raise StorageError(f"{place}: {path} is a link or a folder, not a plain file")
        with archive.open(found[0]) as member:
            return _limited(member.read(max_bytes + 1), path, place, max_bytes)


def _read_tar(stream: BinaryIO, path: str, *, place: str, max_bytes: int) -> bytes:
    with tarfile.open(fileobj=stream, mode="r:*") as archive:
        found = [info for info in archive if info.name == path]
        _check_single(len(found), path, place)
        member = archive.extractfile(found[0]) if found[0].isreg() else None
        if member is None:
            raise StorageError(f"{place}: {path} is a link or a folder, not a plain file")
        content = _limited(member.read(max_bytes + 1), path, place, max_bytes)
        if len(content) != found[0].size:
            raise StorageError(f"{place} is damaged: {path} is cut short; delete it and fetch it again")
        return content


def _check_single(count: int, path: str, place: str) -> None:
    """Refuse a missing file, and two of one name: which of them a reader meets first is up to the reader."""
    if count != 1:
        what = "no file" if count == 0 else f"{count} files"
        raise StorageError(f"{place} has {what} named {path}; expected exactly one")


def _limited(content: bytes, path: str, place: str, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise StorageError(f"{place}: {path} unpacks to more than {max_bytes} bytes; refused")
    return content
