"""The index of a sharded checkpoint: which file holds which piece of which tensor; written by ranks, trusted by nobody.

A checkpoint that was written by several processes is a small JSON file. Its tensors lie beside it in
`shards/<step>-<random>/rank-<n>.safetensors`. Everything in an index is checked before it is used: names stay inside
that folder, pieces tile their tensors without a gap or an overlap, and files have the size and sha256 they should have.
"""

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_opt.checkpointing.digest import CheckpointDamagedError, sha256_of
from lightning_opt.errors import UntrustedInputError

FORMAT, VERSION = "lightning_opt sharded checkpoint", 1
SHARDS = "shards"
_FOLDER = re.compile(rf"{SHARDS}/\d{{1,20}}-[0-9a-f]{{8}}")
_FILE = re.compile(r"rank-\d{5,9}\.safetensors")
_FOLDER_IN_HEAD = re.compile(rb'"folder": "([^"]+)"')
_HEAD_BYTES = 512
DTYPES = {str(one).removeprefix("torch."): one for one in vars(torch).values() if isinstance(one, torch.dtype)}

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a piece of a tensor."""


@dataclass(frozen=True)
class ShardFile:
    """What a file with tensors must be to be whole."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """Where a piece of a tensor lies."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def box(self) -> Box:
        """Which part of the tensor it is."""
        return self.offsets, self.sizes


@dataclass(frozen=True)
class Stored:
    """A logical tensor and the pieces that it lies in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Index:
    """A sharded checkpoint without its tensors.

    Args:
        folder: Of the files with tensors, relative to the index.
        files: What each must be.
        tensors: By name.
        rest: The encoded tree of everything else.
        step: Optimizer steps that were done.
        epoch: Likewise.
    """

    folder: str
    files: Mapping[str, ShardFile]
    tensors: Mapping[str, Stored]
    rest: Any
    step: int = 0
    epoch: int = 0

    def to_json(self) -> bytes:
        """Return the content of the index file; its first words say what it is and which folder it needs."""
        said = {
            "format": FORMAT,
            "version": VERSION,
            "folder": self.folder,
            "step": self.step,
            "epoch": self.epoch,
            "files": {name: [file.size, file.sha256] for name, file in self.files.items()},
            "tensors": {name: _tensor_to_json(stored) for name, stored in self.tensors.items()},
            "rest": self.rest,
        }
        return (json.dumps(said, allow_nan=False) + "\n").encode()


def is_index(path: Path) -> bool:
    """Whether a file claims to be the index of a sharded checkpoint."""
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False


def folder_of(path: Path) -> str | None:
    """Return the folder that an index needs, from its first words alone; None for any other file.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    found = _FOLDER_IN_HEAD.search(head) if head.startswith(b"{") else None
    return found.group(1).decode("ascii", "replace") if found else None


def read_index(path: Path) -> Index:
    """Read and check an index; the files that it names are not looked at.

    Raises:
        CheckpointDamagedError: It is not whole, or says what cannot be.
        UntrustedInputError: It names files outside its folder.
    """
    try:
        said = json.loads(path.read_bytes(), parse_constant=_no_constant)
        if said["format"] != FORMAT or said["version"] != VERSION:
            raise CheckpointDamagedError(
                f"{path} is no sharded checkpoint of version {VERSION}: {str(said['format'])[:80]!r}, version "
                f"{str(said['version'])[:20]}"
            )
        index = _from_json(path, said)
        _check_volume(path, index)
        return index
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise CheckpointDamagedError(f"{path} is damaged: it is no index of a sharded checkpoint ({reason})") from error


def shard_paths(path: Path, index: Index) -> dict[str, Path]:
    """Return where the files of an index are, after a look at what they are.

    Raises:
        CheckpointDamagedError: One is missing or has another size.
        UntrustedInputError: Something is a link or no ordinary file.
    """
    paths = {name: path.parent / index.folder / name for name in index.files}
    for folder in (path.parent / SHARDS, path.parent / index.folder):
        _check_kind(path, folder, stat.S_ISDIR)
    for name, place in paths.items():
        status = _check_kind(path, place, stat.S_ISREG)
        if status.st_size != index.files[name].size:
            raise CheckpointDamagedError(
                f"{place} of {path.name} is damaged: {status.st_size} bytes instead of {index.files[name].size}"
            )
    return paths


def verify_shards(path: Path, index: Index, *, share: tuple[int, int] = (0, 1)) -> None:
    """Check every file of an index by its size, and a share of them by their sha256.

    Args:
        path: Of the index.
        index: Its content.
        share: `(k, n)`: each n-th file beginning with the k-th, so that n processes read each file once.

    Raises:
        CheckpointDamagedError: Naming the file.
        UntrustedInputError: Something is a link or no ordinary file.
    """
    paths = shard_paths(path, index)
    for name in sorted(paths)[share[0] :: share[1]]:
        if sha256_of(paths[name]) != index.files[name].sha256:
            raise CheckpointDamagedError(
                f"{paths[name]} of {path.name} is damaged: its content does not match its sha256"
            )


def covers(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether boxes tile a shape without a gap or an overlap (by straight cuts, as a mesh of processes makes them).

    Example:
        >>> covers((4, 2), [((0, 0), (3, 2)), ((3, 0), (1, 2))]), covers((4,), [((0,), (3,)), ((2,), (2,))])
        (True, False)
    """
    if not math.prod(shape):
        return not boxes
    ranges = [tuple(zip(offsets, map(sum, zip(offsets, sizes, strict=True)), strict=True)) for offsets, sizes in boxes]
    return _tile(tuple((0, size) for size in shape), ranges)


_Ranges = tuple[tuple[int, int], ...]


def _tile(space: _Ranges, boxes: Sequence[_Ranges]) -> bool:
    if len(boxes) == 1:
        return boxes[0] == space
    for dim, (begin, end) in enumerate(space):
        groups = _cut(boxes, dim)
        if len(groups) < 2:
            continue
        edges = [(min(box[dim][0] for box in group), max(box[dim][1] for box in group)) for group in groups]
        if edges[0][0] != begin or edges[-1][1] != end or any(a[1] != b[0] for a, b in itertools.pairwise(edges)):
            return False
        within = [(*space[:dim], edge, *space[dim + 1 :]) for edge in edges]
        return all(_tile(*pair) for pair in zip(within, groups, strict=True))
    return False


def _cut(boxes: Sequence[_Ranges], dim: int) -> list[list[_Ranges]]:
    groups: list[list[_Ranges]] = []
    reached = -1
    for box in sorted(boxes, key=lambda one: one[dim]):
        if box[dim][0] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, box[dim][1])
    return groups


def _tensor_to_json(stored: Stored) -> list[Any]:
    pieces = [[piece.file, piece.key, list(piece.offsets), list(piece.sizes)] for piece in stored.pieces]
    return [str(stored.dtype).removeprefix("torch."), list(stored.shape), pieces]


def _from_json(path: Path, said: dict[str, Any]) -> Index:
    folder = said["folder"]
    files = {name: ShardFile(_natural(size), str(digest)) for name, (size, digest) in said["files"].items()}
    for name, pattern in ((folder, _FOLDER), *((file, _FILE) for file in files)):
        if not isinstance(name, str) or pattern.fullmatch(name) is None:
            raise UntrustedInputError(f"{path} names {str(name)[:80]!r}, which is not inside its folder {SHARDS}")
    tensors = {name: _read_tensor(path, name, one, files) for name, one in said["tensors"].items()}
    used = [(piece.file, piece.key) for stored in tensors.values() for piece in stored.pieces]
    if len(set(used)) != len(used):
        raise CheckpointDamagedError(f"{path} is damaged: two pieces of tensors are said to lie in one place")
    step, epoch = _natural(said["step"]), _natural(said["epoch"])
    return Index(folder=folder, files=files, tensors=tensors, rest=said["rest"], step=step, epoch=epoch)


def _read_tensor(path: Path, name: str, said: Any, files: Mapping[str, ShardFile]) -> Stored:
    dtype, shape, pieces = said
    stored = Stored(
        DTYPES[dtype], _naturals(shape), tuple(Piece(f, k, _naturals(o), _naturals(s)) for f, k, o, s in pieces)
    )
    if any(piece.file not in files or not isinstance(piece.key, str) for piece in stored.pieces):
        raise CheckpointDamagedError(f"{path} is damaged: tensor {name[:80]!r} lies in a file that is not listed")
    if not covers(stored.shape, [piece.box for piece in stored.pieces]):
        raise CheckpointDamagedError(
            f"{path} is damaged: the pieces of tensor {name[:80]!r} do not make up its shape {stored.shape}"
        )
    return stored


def _check_volume(path: Path, index: Index) -> None:
    """Refuse an index whose tensors cannot fit into its files: no memory is asked for on its word alone."""
    needed = dict.fromkeys(index.files, 0)
    for stored in index.tensors.values():
        for piece in stored.pieces:
            needed[piece.file] += math.prod(piece.sizes) * stored.dtype.itemsize
    for name, size in needed.items():
        if size > index.files[name].size:
            raise CheckpointDamagedError(
                f"{path} is damaged: {size} bytes of tensors are said to lie in {name}, which has "
                f"{index.files[name].size}"
            )


def _check_kind(path: Path, place: Path, wanted: Any) -> os.stat_result:
    try:
        status = place.lstat()
    except FileNotFoundError as error:
        raise CheckpointDamagedError(f"{place} of {path.name} is missing") from error
    if not wanted(status.st_mode):
        raise UntrustedInputError(f"{place} of {path.name} is a link or no ordinary file: not followed")
    return status


def _naturals(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{str(values)[:40]} is no list of numbers")
    return tuple(_natural(one) for one in values)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
