"""Writes and reads checkpoints: whole or not there, and never a reason to run code from a file."""

import contextlib
import os
import pickle
import re
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_opt.checkpointing.files import (
    CheckpointDamagedError,
    manifest_path,
    remove,
    require_free_space,
    sha256_of,
    sweep_stale_temps,
    verify,
    write_durably,
)
from lightning_opt.checkpointing.garbage import collect_garbage
from lightning_opt.checkpointing.primitives import to_primitives
from lightning_opt.checkpointing.sharded import is_index, load_whole
from lightning_opt.errors import StorageError, UntrustedInputError

__all__ = [
    "CheckpointDamagedError",
    "DurableCheckpointIO",
    "load_primitives",
    "require_free_space",
    "sweep_stale_temps",
    "verify",
]

_URL = re.compile(r"^(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*)://(?P<rest>.*)$")
_PINNED = re.compile(r"^(?P<url>[^#]+)#sha256=(?P<sha256>[0-9a-fA-F]{64})$")


class DurableCheckpointIO(CheckpointIO):
    """Saves so that a kill, a full disk or a power cut leaves the previous or the new checkpoint whole.

    The file is written beside its place, flushed to the disk, announced in a manifest (`<name>.json`: size, sha256,
    step, epoch) and renamed. Only what loads with `weights_only=True` is written. Loading checks the manifest first;
    a file without one (from another project) is loaded with a warning, and never with anything but
    `weights_only=True`. The index of a sharded checkpoint is loaded as the ordinary checkpoint of one process. A URL
    needs its sha256: `https://host/model.ckpt#sha256=<64 hex digits>`.

    Attributes:
        before_publish: Called in each save when the new version is whole on the disk and the old one still in place.
    """

    before_publish: Callable[[], None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint durably.

        Raises:
            ConfigError: If it holds something that could only be loaded by running code.
            StorageError: If it cannot be written; the previous file is intact.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r} is not used here: leave it out")
        plain = to_primitives(checkpoint)
        write_durably(
            Path(path),
            lambda sink: torch.save(plain, sink),  # type: ignore[arg-type]
            step=int(plain.get("global_step", 0)),
            epoch=int(plain.get("epoch", 0)),
            before_publish=self.before_publish,
        )
        collect_garbage(Path(path).parent)  # if what it replaced was written by several processes

    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and load a checkpoint.

        Raises:
            CheckpointDamagedError: If the file is missing or not what its manifest says.
            UntrustedInputError: If loading it would run code, or it is a URL without a sha256.
            StorageError: If the disk fails.
        """
        if weights_only is False:
            raise UntrustedInputError(f"{path}: weights_only off would run code from the file; leave it out")
        if (url := _URL.match(os.fspath(path))) is not None and url["scheme"] != "file":
            return _load_url(os.fspath(path), map_location=map_location)
        local = Path(url["rest"] if url is not None else path)
        if local.is_file() and not manifest_path(local).exists():
            rank_zero_warn(f"{local} has no manifest: it is loaded without a check of its content")
        else:
            verify(local)
            if is_index(local):
                return _on(load_whole(local, verified=True), map_location)
        return load_primitives(local, map_location=map_location)

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint, its manifest and what it alone needs."""
        remove(Path(path))
        collect_garbage(Path(path).parent)


def load_primitives(path: Path, *, map_location: Any | None = None) -> Any:
    """Load a file that must hold nothing but tensors and plain values, or a sharded checkpoint as if it were one.

    Raises:
        UntrustedInputError: If loading it would run code.
        CheckpointDamagedError: If it is not a whole file of `torch.save`.
        StorageError: If the disk fails.
    """
    if is_index(path):
        return _on(load_whole(path), map_location)
    try:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UntrustedInputError(f"{path} asks for code to be run ({_first_reason(error)}): not loaded") from error
    except RuntimeError as error:
        if "weights_only" in str(error):
            raise UntrustedInputError(f"{path} is no plain checkpoint ({_first_reason(error)}): not loaded") from error
        raise CheckpointDamagedError(f"{path} is damaged: {_first_reason(error)}") from error
    except OSError as error:
        if error.errno is not None and Path(path).exists() and error.strerror not in (None, "Invalid argument"):
            raise StorageError(f"{path} could not be read: {error.strerror}") from error
        raise CheckpointDamagedError(f"{path} is damaged: {_first_reason(error)}") from error
    except (EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointDamagedError(f"{path} is damaged: {_first_reason(error)}") from error


def _on(checkpoint: dict[str, Any], map_location: Any | None) -> dict[str, Any]:
    """Return a checkpoint that was read on the CPU on the devices that `torch.load` would have put it on."""
    if map_location is None or map_location == "cpu":
        return checkpoint
    if not isinstance(map_location, str | torch.device):
        raise TypeError(f"map_location={map_location!r}: a sharded checkpoint is moved to one device, name it")
    moved: dict[str, Any] = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda one: one.to(map_location), checkpoint
    )
    return moved


def _first_reason(error: BaseException) -> str:
    """Return the sentence of torch's message that says what was found, not the advice to load it unsafely."""
    text = str(error)
    for pattern in (r"[Uu]nsupported (?:global: )?GLOBAL \S+", r"Unsupported operand \d+", r"Cannot use ``[^.]+\."):
        if (found := re.search(pattern, text)) is not None:
            return " ".join(found.group(0).split())
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    advice = len(paragraphs) > 1 and "weights_only" in paragraphs[0]
    return (paragraphs[1 if advice else 0] if paragraphs else type(error).__name__)[:160]


def _load_url(text: str, *, map_location: Any | None) -> dict[str, Any]:
    pinned = _PINNED.match(text)
    if pinned is None or not pinned["url"].startswith(("https://", "http://")):
        raise UntrustedInputError(
            f"{text}: a checkpoint from a URL needs its sha256: <https url>#sha256=<64 hex digits>, or download it"
        )
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "download.ckpt"
        try:
            with contextlib.closing(urllib.request.urlopen(pinned["url"], timeout=60)) as answer:
                local.write_bytes(answer.read())
        except OSError as error:
            raise StorageError(f"{pinned['url']} could not be downloaded: {error}") from error
        if (found := sha256_of(local)) != pinned["sha256"].lower():
            raise UntrustedInputError(f"{pinned['url']} has sha256 {found}, not {pinned['sha256']}: not loaded")
        return load_primitives(local, map_location=map_location)
