"""How several processes write one checkpoint: each its pieces, then the first one the index."""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightning_opt.checkpointing import together
from lightning_opt.checkpointing.digest import CheckpointDamagedError
from lightning_opt.checkpointing.files import HashingSink, fsync_folder, storage_errors, write_durably
from lightning_opt.checkpointing.garbage import collect_garbage
from lightning_opt.checkpointing.index import SHARDS, Box, Index, Piece, ShardFile, Stored, covers, shard_paths
from lightning_opt.checkpointing.layout import Part, parts_of
from lightning_opt.checkpointing.shard_file import write_shard
from lightning_opt.checkpointing.tree import encode
from lightning_opt.errors import ConfigError, StorageError

Parts = Mapping[str, Part | Sequence[Part] | None]
_Described = dict[str, tuple[torch.dtype, tuple[int, ...], list[Box]]]


def save_sharded(
    path: Path,
    *,
    parts: Parts,
    rest: Any,
    step: int = 0,
    epoch: int = 0,
    before_publish: Callable[[], None] | None = None,
) -> None:
    """Write a checkpoint from all processes of the default group; all must call it.

    A piece that several processes offer is written by the first of them.

    Args:
        path: Of the index; the tensors go into `shards/` beside it, which all processes must see.
        parts: What this process holds of each logical tensor.
        rest: Everything else; the first process's is kept. Its tensors are, too; of those that are DTensors every
            process writes its piece.
        step: How far the run is, for the manifest.
        epoch: Likewise.
        before_publish: Called in the first process when every piece is durable and the old index still in its place.

    Raises:
        StorageError: The disk of a process is full or fails; the previous version is intact. On all processes.
        ConfigError: Something could not be loaded without running code, or the pieces make up no tensor.
    """
    first = together.rank() == 0
    encoded, mine = together.agree(lambda: _collect(parts, rest, first=first))
    offered = together.gather((_describe(mine), f"{SHARDS}/{step}-{secrets.token_hex(4)}"))
    folder = offered[0][1]
    plan = _plan([described for described, _ in offered])
    try:
        file = together.agree(lambda: _write_mine(path.parent / folder, mine, plan[together.rank()]))
        files = {_file_name(rank): one for rank, one in enumerate(together.gather(file)) if one is not None}
        tensors = {name: _stored(name, [one for one, _ in offered], plan) for name in _names(offered)}
        index = Index(folder=folder, files=files, tensors=tensors, rest=encoded, step=step, epoch=epoch)
        together.agree(lambda: _publish(path, index, before_publish) if first else None)
    finally:
        if first:
            collect_garbage(path.parent)


def total_bytes(parts: Mapping[str, Sequence[Part]]) -> int:
    """Return the bytes of all pieces."""
    return sum(math.prod(part.local.shape) * part.local.dtype.itemsize for pieces in parts.values() for part in pieces)


def _collect(parts: Parts, rest: Any, *, first: bool) -> tuple[Any, dict[str, list[Part]]]:
    encoded, tensors = encode(rest, prefix="rest")
    mine = {name: [part] if isinstance(part, Part) else list(part or ()) for name, part in parts.items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) or first:
            mine[name] = parts_of(tensor, replica=0)
    return encoded, mine


def _describe(mine: Mapping[str, Sequence[Part]]) -> _Described:
    return {
        name: (
            parts[0].local.dtype,
            parts[0].shape,
            [(part.offsets, tuple(part.local.shape)) for part in parts if part.local.numel()],
        )
        for name, parts in mine.items()
        if parts
    }


def _names(offered: Sequence[tuple[_Described, str]]) -> list[str]:
    return list(dict.fromkeys(name for described, _ in offered for name in described))


def _plan(offered: Sequence[_Described]) -> list[dict[str, list[Box]]]:
    """Return for each rank what it writes; the same on every rank, since every rank knows what all have."""
    plan: list[dict[str, list[Box]]] = [{} for _ in offered]
    taken: dict[str, set[Box]] = {}
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for rank, described in enumerate(offered):
        for name, (dtype, shape, boxes) in described.items():
            if kinds.setdefault(name, (dtype, shape)) != (dtype, shape):
                raise ConfigError(
                    f"checkpoint[{name}] is {dtype} of shape {shape} on rank {rank} and {kinds[name][0]} of shape "
                    f"{kinds[name][1]} on another"
                )
            known = taken.setdefault(name, set())
            new = [box for box in boxes if box not in known]
            known.update(new)
            plan[rank][name] = new
    for name, (_, shape) in kinds.items():
        if not covers(shape, list(taken[name])):
            raise ConfigError(f"checkpoint[{name}]: what the ranks hold does not make up its shape {shape}")
    return plan


def _keyed(name: str, boxes: Sequence[Box]) -> dict[Box, str]:
    """Return the names of a tensor's pieces within one file."""
    return {box: name if len(boxes) == 1 else f"{name}@{number}" for number, box in enumerate(boxes)}


def _write_mine(folder: Path, mine: Mapping[str, Sequence[Part]], boxes: Mapping[str, list[Box]]) -> ShardFile | None:
    tensors = []
    for name, parts in mine.items():
        keys = _keyed(name, boxes.get(name, []))
        tensors += [
            (key, part.local)
            for part in parts
            if (key := keys.get((part.offsets, tuple(part.local.shape)))) is not None
        ]
    return write_shard(folder / _file_name(together.rank()), tensors) if tensors else None


def _stored(name: str, offered: Sequence[_Described], plan: Sequence[Mapping[str, list[Box]]]) -> Stored:
    dtype, shape = next((one[name][0], one[name][1]) for one in offered if name in one)
    pieces = [
        Piece(_file_name(rank), key, *box)
        for rank, boxes in enumerate(plan)
        for box, key in _keyed(name, boxes.get(name, [])).items()
    ]
    return Stored(dtype=dtype, shape=shape, pieces=tuple(pieces))


def _publish(path: Path, index: Index, before_publish: Callable[[], None] | None) -> None:
    (path.parent / index.folder).mkdir(parents=True, exist_ok=True)  # nothing but scalars may be in it
    try:
        shard_paths(path, index)
    except CheckpointDamagedError as error:
        raise StorageError(
            f"{error}: it was written by another rank, so {path.parent} is not the same folder for all ranks; choose a "
            "run_dir on a file system that they share"
        ) from error
    for folder in (path.parent / index.folder, path.parent / SHARDS, path.parent):
        with storage_errors(folder):
            fsync_folder(folder)
    content = index.to_json()

    def write(sink: HashingSink) -> None:
        sink.write(content)

    write_durably(path, write, step=index.step, epoch=index.epoch, before_publish=before_publish)


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
