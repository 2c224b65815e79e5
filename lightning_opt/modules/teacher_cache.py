"""A teacher's answers on the training set, computed once and read from disk ever after.

The cache is keyed by everything the answers depend on: the teacher's weights, its preprocessing, the data and how many
versions of each sample augmentation makes. A changed key is another cache, never a wrong answer.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.losses import Signals, Supervision, combine_teachers
from lightning_opt.losses.teachers import Mix, TeacherWeights
from lightning_opt.losses.top_k import TopK, expand_top_k, top_k_of
from lightning_opt.modules.teacher import Teacher
from lightning_opt.tasks import Example

Fetch = Callable[[int, Sequence[int]], Example]
_META = "meta.json"
_PROBES = 8


class TeacherCache:
    """Read a teacher's stored logits by sample.

    Several processes may read one cache; the files are memory-mapped.

    Args:
        folder: Made by `store`.

    Raises:
        StorageError: The folder is not a finished cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / _META).read_text(encoding="utf-8"))
            # As plain arrays: each look into a memmap makes another memmap, which takes a third of a read's time.
            self._arrays = {
                name: np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
                for name in self.meta["arrays"]
            }
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"{folder} is not a teacher cache ({error}); delete it and run again") from error
        self.num_outputs: int = self.meta["num_outputs"]
        self.versions: int = self.meta["versions"]

    def read(self, index: Tensor, *, epoch: int) -> Tensor:
        """Return `(B, C)` or `(B, T, V)` float32 logits of the samples at `index` as they look in `epoch`."""
        rows = index.cpu().numpy()
        version = epoch % self.versions
        if "logits" in self._arrays:
            return torch.from_numpy(self._arrays["logits"][version, rows].astype(np.float32))
        kept = {name: torch.from_numpy(np.array(array[version, rows])) for name, array in self._arrays.items()}
        top_k = TopK(kept["indices"].long(), kept["log_probs"].float(), kept["tail_log_mass"].float())
        return expand_top_k(top_k, num_classes=self.num_outputs)


def cache_key(
    teachers: Sequence[Teacher],
    *,
    data_fingerprint: str,
    versions: int,
    spec: dict[str, Any],
    weighting: TeacherWeights,
) -> str:
    """Return the hex sha256 of everything that the stored answers depend on."""
    digest = hashlib.sha256()
    for teacher in teachers:
        digest.update(f"{teacher.dtype} {teacher.preprocess!r}{' channels_last' * teacher.channels_last}".encode())
        for name, value in sorted(teacher.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    rest = {"data": data_fingerprint, "versions": versions, "spec": spec, "weighting": repr(vars(weighting))}
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Views:
    """Versions of each sample that only the teacher sees.

    Attributes:
        fetch: Gives the samples of `(version, indices)` as one example.
        count: How many versions there are.
    """

    fetch: Fetch
    count: int


def store(
    folder: Path,
    teachers: Sequence[Teacher],
    *,
    fetch: Fetch,
    num_samples: int,
    versions: int,
    weighting: TeacherWeights,
    mix: Mix,
    views: Views | None = None,
    outputs: str = "full",
    k: int = 64,
    batch_size: int = 256,
) -> TeacherCache:
    """Ask the teachers about every sample in every version once, and store the combined logits in float16.

    Args:
        folder: Where the finished cache will be; it appears only when it is complete.
        teachers: Who answers.
        fetch: Gives the samples of `(epoch, indices)` as one example.
        num_samples: Size of the training set.
        versions: How many versions of each sample there are; 1 where samples never change.
        weighting: How much each of several teachers counts.
        mix: What is averaged then.
        views: What the teachers are asked about instead of the sample itself; the mean of their logits is stored.
        outputs: "full" logits, or "top_k" log-probabilities with the mass of the tail.
        k: How many outputs "top_k" keeps.
        batch_size: Samples per question.

    Raises:
        ConfigError: The samples are not a function of (version, index): random augmentation without a seed.
        StorageError: The disk is full.
    """
    check_replayable(fetch, num_samples=num_samples, versions=versions)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def answers() -> Iterator[tuple[int, range, Tensor]]:
        for version, start in product(range(versions), range(0, num_samples, batch_size)):
            rows = range(start, min(start + batch_size, num_samples))
            example = fetch(version, rows)
            said = [_mean_answer(teacher, example, rows, views) for teacher in teachers]
            shares = weighting(said, Supervision(labels=example.labels))
            yield version, rows, combine_teachers(said, shares, mix=mix).logits

    try:
        meta = _fill(partial, answers(), outputs, k, (versions, num_samples))
        (partial / _META).write_text(json.dumps({**meta, "versions": versions}), encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.is_dir():  # another process was faster
            return TeacherCache(folder)
        raise StorageError(f"teacher.cache: cannot write {folder} ({error.strerror}); free some space") from error
    return TeacherCache(folder)


def _mean_answer(teacher: Teacher, example: Example, rows: Sequence[int], views: Views | None) -> Signals:
    """Ask a teacher about samples, or about each view of them and take the mean of its logits."""
    if views is None:
        return teacher(example.inputs)
    answers = [teacher(views.fetch(version, rows).inputs).logits for version in range(views.count)]
    return Signals(logits=torch.stack(answers).mean(dim=0))


def _fill(
    folder: Path, answers: Iterator[tuple[int, range, Tensor]], outputs: str, k: int, leading: tuple[int, int]
) -> dict[str, Any]:
    """Write answers into memory-mapped arrays, which are made when the first answer tells their shape."""
    arrays: dict[str, Any] = {}
    num_outputs = 0
    for version, rows, logits in answers:
        num_outputs = logits.shape[-1]
        parts = {"logits": logits.half().numpy()} if outputs == "full" else _top_k(logits, min(k, num_outputs))
        for name, part in parts.items():
            if name not in arrays:
                shape = (*leading, *part.shape[1:])
                arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", part.dtype, shape)
            arrays[name][version, rows.start : rows.stop] = part
    for array in arrays.values():
        array.flush()
    return {"arrays": sorted(arrays), "num_outputs": num_outputs}


def _top_k(logits: Tensor, k: int) -> dict[str, np.ndarray]:
    kept = top_k_of(logits, k=k)
    kind = np.uint16 if logits.shape[-1] <= 1 << 16 else np.int32
    # float16 ends near 65,504: a tail without mass, -inf, stays what it is
    return {
        "indices": kept.indices.numpy().astype(kind),
        "log_probs": kept.log_probs.half().numpy(),
        "tail_log_mass": kept.tail_log_mass.half().numpy(),
    }


def check_replayable(fetch: Fetch, *, num_samples: int, versions: int) -> None:
    """Refuse data whose samples change otherwise than by their version.

    Raises:
        ConfigError: A sample differed when it was read twice, or an epoch beyond the versions shows a new sample.
    """
    rows = range(min(_PROBES, num_samples))
    first = fetch(0, rows)
    if not _same(first, fetch(0, rows)):
        raise ConfigError(
            "teacher.cache: the data's random augmentation is not seeded, so stored answers would not fit its samples; "
            "set teacher.cache=null or use a seeded augmentation"
        )
    if not _same(first, fetch(versions, rows)):
        raise ConfigError(
            "teacher.cache: the data makes new random versions of its samples in every epoch, more than can be stored; "
            "set data.variants=K for K replayable versions, or teacher.cache=null"
        )


def _same(one: Example, other: Example) -> bool:
    tensors = [_tensors(example.inputs) for example in (one, other)]
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def _tensors(inputs: Any) -> list[Tensor]:
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]
