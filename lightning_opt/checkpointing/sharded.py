"""Checkpoints that several processes write and any number of processes read, without pickle in any file.

Each process writes the pieces of tensors that it holds; the first one then publishes a small JSON index, with its
manifest, like any other checkpoint. Until then the previous version is what it was, whatever happens to whom.

```python
save_sharded(path, parts={"state_dict.w": part_of(weight)}, rest={"global_step": 10})  # in every process
saved = ShardedCheckpoint(path)
saved.read("state_dict.w", offsets=(0, 0), sizes=(4, 8))  # anywhere, in any number of processes
```
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_opt.checkpointing import together
from lightning_opt.checkpointing.digest import CheckpointDamagedError
from lightning_opt.checkpointing.files import manifest_path, verify_file
from lightning_opt.checkpointing.garbage import collect_garbage
from lightning_opt.checkpointing.index import Box, is_index, read_index, shard_paths, verify_shards
from lightning_opt.checkpointing.layout import Part, like, local_of, part_of, parts_of
from lightning_opt.checkpointing.shard_file import ShardReader
from lightning_opt.checkpointing.sharded_save import save_sharded
from lightning_opt.checkpointing.tree import decode

__all__ = [
    "Part",
    "ShardedCheckpoint",
    "collect_garbage",
    "is_index",
    "like",
    "load_whole",
    "local_of",
    "open_together",
    "part_of",
    "parts_of",
    "save_sharded",
]

_log = logging.getLogger(__name__)


class ShardedCheckpoint:
    """A sharded checkpoint, of which only what is asked for is read.

    Args:
        path: Of the index.
        verified: Whether its files were checked a moment ago.
        share: `(k, n)`: check only each n-th file beginning with the k-th; the other processes check the others.

    Attributes:
        step: Optimizer steps that were done.
        epoch: Likewise.
        shapes: Of the logical tensors, by name.
        dtypes: Likewise.

    Raises:
        CheckpointDamagedError: A file is missing or not what it should be; the message names it.
        UntrustedInputError: It points outside its folder.
    """

    def __init__(self, path: str | Path, *, verified: bool = False, share: tuple[int, int] = (0, 1)) -> None:
        self.path = Path(path)
        self._index = read_index(self.path)
        self.step, self.epoch = self._index.step, self._index.epoch
        if not verified:
            verify_shards(self.path, self._index, share=share)
        self._paths = shard_paths(self.path, self._index)
        self._readers: dict[str, ShardReader] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The logical shapes by name."""
        return {name: stored.shape for name, stored in self._index.tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes by name."""
        return {name: stored.dtype for name, stored in self._index.tensors.items()}

    @property
    def rest(self) -> Any:
        """Everything that was saved beside the parts, with its tensors whole."""
        return decode(self._index.rest, self.read)

    def __contains__(self, name: str) -> bool:
        return name in self._index.tensors

    def names(self, prefix: str = "") -> list[str]:
        """Return the names that begin with a prefix, without it."""
        return [name[len(prefix) :] for name in self._index.tensors if name.startswith(prefix)]

    def read(self, name: str, *, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """Return a tensor, or a box of it; only the files that hold a part of it are touched.

        Args:
            name: Of the logical tensor.
            offsets: Where the box begins; None: at the start.
            sizes: Of the box; None: up to the end.

        Raises:
            KeyError: There is no such tensor.
            CheckpointDamagedError: A file holds something else than the index says.
        """
        stored = self._index.tensors[name]
        begin = tuple(offsets) if offsets is not None else (0,) * len(stored.shape)
        size = tuple(sizes) if sizes is not None else tuple(n - b for n, b in zip(stored.shape, begin, strict=True))
        if any(b < 0 or s < 0 or b + s > n for b, s, n in zip(begin, size, stored.shape, strict=True)):
            raise ValueError(f"{name}: a box at {begin} of {size} is not within {stored.shape}")
        target = torch.empty(size, dtype=stored.dtype)
        for piece in stored.pieces:
            if (shared := _overlap((begin, size), piece.box)) is not None:
                self._reader(piece.file).read_into(target[shared[0]], piece, shared[1])
        return target

    def _reader(self, file: str) -> ShardReader:
        if file not in self._readers:
            self._readers[file] = ShardReader(self._paths[file])
        return self._readers[file]


def load_whole(path: str | Path, *, verified: bool = False) -> dict[str, Any]:
    """Read a sharded checkpoint as one ordinary Lightning checkpoint of one process.

    Args:
        path: Of the index.
        verified: Whether its files were checked a moment ago.

    Raises:
        CheckpointDamagedError: A file is missing or not what it should be; the message names it.
        UntrustedInputError: It points outside its folder.
    """
    saved = ShardedCheckpoint(path, verified=verified)
    with malformed(saved.path):
        rest: dict[str, Any] = saved.rest
        about, optimizers = rest.pop("sharded", {}), rest.pop("optimizers", None)
        state: OrderedDict[str, Any] = OrderedDict(
            (n, saved.read(f"state_dict.{n}")) for n in saved.names("state_dict.")
        )
        state.update(about.get("extra_state", {}))
        state._metadata = about.get("versions", OrderedDict())  # type: ignore[attr-defined]
        rest["state_dict"] = state
        if optimizers is not None:
            rest["optimizer_states"] = [_numbered(saved, number, one) for number, one in enumerate(optimizers)]
        return rest


def optimizer_tensors(saved: ShardedCheckpoint, number: int) -> dict[str, dict[str, str]]:
    """Return `{parameter: {state key: full name}}` of an optimizer's tensors."""
    prefix = f"optimizer.{number}."
    found: dict[str, dict[str, str]] = {}
    for name in saved.names(prefix):
        parameter, _, key = name.rpartition(".")
        found.setdefault(parameter, {})[key] = prefix + name
    return found


def open_together(path: Path) -> ShardedCheckpoint:
    """Open a sharded checkpoint in every process; each checks a share of the files, and all fail if one does."""
    return together.agree(lambda: _open_share(path))


@contextlib.contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Turn what a tree of the wrong form leads to into one sentence.

    Raises:
        CheckpointDamagedError: Instead of a `KeyError`, `TypeError`, ...
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        raise CheckpointDamagedError(f"{path} is no checkpoint of a training run ({reason})") from error


def _open_share(path: Path) -> ShardedCheckpoint:
    if manifest_path(path).exists():
        verify_file(path)
    else:
        _log.warning("%s has no manifest: its index is read without a check of its content", path)
    return ShardedCheckpoint(path, share=(together.rank(), together.processes()))


def _overlap(wanted: Box, there: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return which part of the wanted box a piece holds, in the box's own coordinates and in the piece's."""
    inside, within = [], []
    for begin, size, start, length in zip(*wanted, *there, strict=True):
        low, high = max(begin, start), min(begin + size, start + length)
        if low >= high:
            return None
        inside.append(slice(low - begin, high - begin))
        within.append(slice(low - start, high - start))
    return tuple(inside), tuple(within)


def _numbered(saved: ShardedCheckpoint, number: int, one: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with numbers for names, as its `state_dict` has it in one process."""
    order = [name for group in one["param_groups"] for name in group["params"]]
    numbers = {name: place for place, name in enumerate(order)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in one["param_groups"]]
    states: dict[int, dict[str, Any]] = {}
    tensors = optimizer_tensors(saved, number)
    for name in order:
        state = {key: saved.read(full) for key, full in tensors.get(name, {}).items()} | one["others"].get(name, {})
        if state:
            states[numbers[name]] = state
    return {"state": states, "param_groups": groups}
