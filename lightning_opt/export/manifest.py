"""What is in an artifact folder: the size and sha256 of each file, and what wrote it.

The sums find damage and mix-ups, not malice: who can change a file can change its sum. What keeps a foreign artifact
from running code is exact-name trust, a closed set of edits, and safetensors.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_opt.errors import StorageError, UntrustedInputError
from lightning_opt.export.files import read_bytes, sha256_of, write_text

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
MAX_JSON_BYTES = 64 << 20
"""Largest JSON file of an artifact that is read."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_PACKAGES = ("lightning_opt", "torch", "safetensors")

Manifest = dict[str, Any]


def write_manifest(folder: Path, files: Iterable[str], *, meta: Mapping[str, Any] | None = None) -> Manifest:
    """Describe `files` in a new manifest, which replaces the old one.

    Raises:
        StorageError: A file is missing, or the manifest cannot be written.
        ValueError: `meta` is not plain JSON, or a name is no plain file name.
    """
    return _write(
        folder,
        {
            "schema_version": SCHEMA_VERSION,
            "versions": _versions(),
            "files": {name: _entry(folder, name) for name in files},
            "meta": plain_json(dict(meta or {}), "meta"),
        },
    )


def add_to_manifest(folder: str | Path, files: Iterable[str]) -> Manifest:
    """Describe more files of a folder in its manifest; where there is none, one is made.

    Args:
        folder: The artifact folder.
        files: Their names in it.

    Raises:
        StorageError: A file is missing, or the manifest is damaged or cannot be written.
        ValueError: A name is no plain file name.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return write_manifest(folder, files)
    manifest = read_manifest(folder)
    manifest["files"] |= {name: _entry(folder, name) for name in files}
    return _write(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check its form and its own sha256.

    Raises:
        StorageError: It is damaged, or of another schema version.
        UntrustedInputError: It lists something that is no plain file of its folder.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        said = manifest.get("schema_version")
        raise StorageError(f"{path} has schema_version {said!r}; this package reads {SCHEMA_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(e, dict) and "sha256" in e for e in files.values()):
        raise StorageError(f"{path} lists no files with their sha256; restore it from a copy")
    for name in files:
        if not _NAME.fullmatch(name):
            raise UntrustedInputError(
                f"{path} lists {name[:120]!r}, which is not a plain file of the artifact; not loaded"
            )
    found = _checksum(manifest)
    if manifest.get("manifest_sha256") != found:
        said = manifest.get("manifest_sha256")
        raise StorageError(f"{path} is damaged: its sha256 is {found}, it says {said}; restore it from a copy")
    return manifest


def verify(folder: Path, manifest: Manifest, *, required: Iterable[str] = ()) -> None:
    """Compare every listed file that is there with its sha256; those of `required` must be there.

    Raises:
        StorageError: A file is missing or differs; the message names it and both sha256s.
        UntrustedInputError: A file is a link or no regular file.
    """
    files = manifest["files"]
    for name in required:
        if name not in files or not (folder / name).exists():
            raise StorageError(f"{folder / name} is missing or not listed in {MANIFEST}; restore it from a copy")
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UntrustedInputError(f"{path} is a link or no regular file; not loaded")
        if not path.exists():
            continue  # an exported format that was removed to save space is no damage
        found = sha256_of(path)
        if found != entry["sha256"]:
            raise StorageError(
                f"{path} is damaged: its sha256 is {found}, {MANIFEST} says {entry['sha256']}; restore it from a copy"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Raises:
        StorageError: It is missing, too large, or no JSON object.
    """
    try:
        value = json.loads(read_bytes(path, limit_bytes=MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: no JSON ({str(error)[:120]}); restore it from a copy") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} is damaged: it holds no JSON object; restore it from a copy")
    return value


def plain_json(value: Any, what: str) -> Any:
    """Return a copy of a value as JSON would give it back.

    Raises:
        ValueError: It holds more than plain JSON values.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be plain JSON values: {error}") from error


def _write(folder: Path, manifest: Manifest) -> Manifest:
    manifest["manifest_sha256"] = _checksum(manifest)
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return manifest


def _checksum(manifest: Manifest) -> str:
    said = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entry(folder: Path, name: str) -> dict[str, Any]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no plain file name; give names of files in {folder}")
    path = folder / name
    if not path.is_file():
        raise StorageError(f"{path} is missing, so it cannot be listed in {MANIFEST}")
    return {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a bare checkout that was never installed
            continue
    return found
