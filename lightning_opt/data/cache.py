"""Arrays that are parsed once and kept: derived files, made again whenever they are not as they were written."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lightning_opt.errors import StorageError

Arrays = Mapping[str, npt.NDArray[Any]]


def cached_arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Return the arrays kept in `path`, or make and keep them.

    The file begins with its own checksum, so a damaged one is noticed and made again.

    Args:
        path: Where to keep them; its name should name their source.
        make: Returns the arrays.

    Raises:
        StorageError: The file cannot be written.
    """
    kept = _read(path)
    if kept is not None:
        return kept
    arrays = make()
    content = save(dict(arrays))
    head = json.dumps({"sha256": hashlib.sha256(content).hexdigest()}).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".parsed-")
        with os.fdopen(handle, "wb") as file:
            file.write(head + content)
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"cannot keep {path} ({error.strerror or error})") from error
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        head, _, content = path.read_bytes().partition(b"\n")
        if json.loads(head).get("sha256") != hashlib.sha256(content).hexdigest():
            return None
        return load(content)
    except (OSError, ValueError, AttributeError, SafetensorError):
        return None
