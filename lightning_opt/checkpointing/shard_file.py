"""A file of tensors in the safetensors format, written durably and read piece by piece."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_opt.checkpointing.digest import CheckpointDamagedError
from lightning_opt.checkpointing.files import HashingSink, fsync_folder, storage_errors
from lightning_opt.checkpointing.index import Piece, ShardFile

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BYTES = "U8"  # what the format has no word for is kept as bytes, in one more dimension
_ALIGNMENT = 8


def write_shard(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> ShardFile:
    """Write tensors into a new file, through to the disk, and return what it must be.

    Only one tensor at a time is copied to the host.

    Raises:
        StorageError: The disk is full or fails; the file is gone again.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    sink = HashingSink(descriptor)
    try:
        with storage_errors(path, needed_bytes=lambda: sink.size):
            _write(sink, tensors)
            if sink.failure is not None:
                raise sink.failure
            os.fsync(descriptor)
            fsync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)
    return ShardFile(size=sink.size, sha256=sink.hexdigest())


class ShardReader:
    """Reads pieces of tensors from one file.

    Args:
        path: Of the file, whose sha256 was checked.

    Raises:
        CheckpointDamagedError: It is no file of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._damage():
            self._file: Any = safe_open(str(path), framework="pt", device="cpu")

    def read_into(self, target: Tensor, piece: Piece, within: tuple[slice, ...]) -> None:
        """Copy a part of a piece into a tensor.

        Args:
            target: Of the shape of that part.
            piece: What is read.
            within: Which part of the piece.

        Raises:
            CheckpointDamagedError: The file holds something else than the index says.
        """
        with self._damage():
            found = self._file.get_slice(piece.key)
            code = _CODES.get(target.dtype, _BYTES)
            shape = list(piece.sizes) + ([target.dtype.itemsize] if target.dtype not in _CODES else [])
            if found.get_dtype() != code or list(found.get_shape()) != shape:
                raise CheckpointDamagedError(
                    f"{self.path} holds {piece.key!r} as {found.get_dtype()} {found.get_shape()}, not as {code} {shape}"
                )
            values = self._file.get_tensor(piece.key) if _is_all(within, piece.sizes) else found[within]
        if target.dtype not in _CODES:
            values = (
                values.clone().view(target.dtype).reshape(target.shape)
            )  # a clone begins at a multiple of its width
        target.copy_(values)

    @contextlib.contextmanager
    def _damage(self) -> Any:
        try:
            yield
        except (SafetensorError, OSError, RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:120]
            raise CheckpointDamagedError(f"{self.path} is damaged: {reason}") from error


def _write(sink: HashingSink, tensors: Sequence[tuple[str, Tensor]]) -> None:
    # wide elements first: everything then begins at a multiple of its width
    ordered = sorted(tensors, key=lambda pair: (-_width(pair[1]), pair[0]))
    described: dict[str, Any] = {}
    place = 0
    for name, tensor in ordered:
        size = tensor.numel() * tensor.dtype.itemsize
        shape = list(tensor.shape) + ([tensor.dtype.itemsize] if tensor.dtype not in _CODES else [])
        code = _CODES.get(tensor.dtype, _BYTES)
        described[name] = {"dtype": code, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    sink.write(len(header).to_bytes(8, "little"))
    sink.write(header)
    for _, tensor in ordered:
        sink.write(_bytes_of(tensor))


def _width(tensor: Tensor) -> int:
    return tensor.dtype.itemsize if tensor.dtype in _CODES else 1


def _bytes_of(tensor: Tensor) -> Any:
    here = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return here.reshape(-1).view(torch.uint8).numpy().data


def _is_all(within: tuple[slice, ...], sizes: tuple[int, ...]) -> bool:
    return all((one.start, one.stop) == (0, size) for one, size in zip(within, sizes, strict=True))
