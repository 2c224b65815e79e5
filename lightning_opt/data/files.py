"""Your own arrays: npz, safetensors and csv files."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from lightning_opt.data.arrays import ArrayDataset
from lightning_opt.data.augment import Transform
from lightning_opt.data.base import DataModule, Splits, require_int, require_one_of
from lightning_opt.data.splits import check_fractions, hashed_split
from lightning_opt.errors import ConfigError, StorageError

Array = npt.NDArray[Any]
_ZIP_DAMAGE = (zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Samples of one file, checked for form."""

    path: Path
    inputs: Array
    targets: Array


class ArrayFiles(DataModule):
    """Samples from files of yours: `.npz` or `.safetensors` with two arrays, or `.csv` with a column for the target.

    Give one `path`, which is split, or `train`, `val` and `test` files.

    Args:
        path: One file with all samples.
        train: File to train on, instead of `path`.
        val: File for validation.
        test: File for the test; None: the validation file.
        inputs_key: Name of the inputs `(N, ...)` in npz and safetensors files.
        targets_key: Name of the targets there.
        label_column: Column of the target in csv files; -1: the last.
        target: "class": whole numbers from 0; "value": numbers, one or several a sample; "multilabel": 0 or 1, several
            a sample.
        num_outputs: Classes, values or labels; None: as many as the training file shows.
        input_shape: Give every sample this shape, such as [1, 28, 28] for rows of 784 numbers; None: as stored.
        scale: Multiply the inputs by this, such as 1/255 for bytes.
        augment: Random change of training samples; None: they never change.
        variants: With `augment`: different versions of each sample.
        val_fraction: With `path`: share of the samples for validation.
        test_fraction: With `path`: share of the samples for the test.
        split_seed: With `path`: another number gives another split.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`; nothing is fetched or kept.

    Raises:
        ValueError: Both or neither of `path` and `train` are given, or another argument is out of range.
        StorageError: A file is missing or damaged (when the data are read).
        ConfigError: A file does not hold what the arguments say (when the data are read).
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        inputs_key: str = "x",
        targets_key: str = "y",
        label_column: int = -1,
        target: Literal["class", "value", "multilabel"] = "class",
        num_outputs: int | None = None,
        input_shape: list[int] | None = None,
        scale: float = 1.0,
        augment: Transform | None = None,
        variants: int = 8,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        if (path is None) == (train is None) or (train is None) != (val is None):
            raise ValueError(f"give path, or train and val; got path={path}, train={train}, val={val}")
        require_one_of("target", target, ("class", "value", "multilabel"))
        check_fractions(val_fraction, test_fraction)
        require_int("variants", variants, at_least=1)
        if num_outputs is not None:
            require_int("num_outputs", num_outputs, at_least=1)
        self.paths = {"path": path, "train": train, "val": val, "test": test if test is not None else val}
        self.inputs_key, self.targets_key, self.label_column = inputs_key, targets_key, label_column
        self.target, self.scale, self._shape = target, scale, tuple(input_shape) if input_shape else None
        self._num_outputs, self.augment = num_outputs, augment
        self._variants = variants if augment is not None else 0
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed

    @property
    def num_outputs(self) -> int:
        if self._num_outputs is None:
            _ = self.splits
        return self._num_outputs or 0

    @property
    def variants(self) -> int:
        return self._variants

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample; the files are read for it unless it was given."""
        if self._shape is None:
            inputs: Tensor = self.splits.val.inputs  # type: ignore[attr-defined]
            self._shape = tuple(inputs.shape[1:])
        return self._shape

    def load(self) -> Splits:
        if self.paths["path"] is not None:
            parts = self._split(self._table(Path(self.paths["path"])))
        else:
            parts = [self._tensors(self._table(Path(str(self.paths[name])))) for name in ("train", "val", "test")]
        (train_x, train_y), val, test = parts
        train = ArrayDataset(train_x, train_y, transform=self.augment, seed=self.seed, variants=self._variants)
        return Splits(train=train, val=ArrayDataset(*val), test=ArrayDataset(*test))

    def _split(self, table: _Table) -> list[tuple[Tensor, Tensor]]:
        x, y = self._tensors(table)
        parts = hashed_split(
            [row.tobytes() for row in x.numpy()],
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            strata=y.tolist() if self.target == "class" else None,
        )
        return [(x[part], y[part]) for part in (parts.train, parts.val, parts.test)]

    def _table(self, path: Path) -> _Table:
        path = path.expanduser()
        if path.suffix == ".csv":
            rows = read_csv(path)
            columns = rows.shape[1]
            if not -columns <= self.label_column < columns:
                raise ConfigError(f"data.label_column={self.label_column}: {path} has {columns} columns")
            place = self.label_column % columns
            return _Table(path=path, inputs=np.delete(rows, place, axis=1), targets=rows[:, place])
        arrays = read_arrays(path)
        for key, name in (("inputs_key", self.inputs_key), ("targets_key", self.targets_key)):
            if name not in arrays:
                raise ConfigError(f"data.{key}={name}: {path} holds {', '.join(sorted(arrays)) or 'nothing'}")
        return _Table(path=path, inputs=arrays[self.inputs_key], targets=arrays[self.targets_key])

    def _tensors(self, table: _Table) -> tuple[Tensor, Tensor]:
        inputs, targets, path = table.inputs, table.targets, table.path
        if inputs.ndim < 1 or targets.ndim < 1 or len(inputs) != len(targets) or not len(inputs):
            raise ConfigError(f"{path}: inputs {inputs.shape} and targets {targets.shape} must be of equal length, > 0")
        for name, array in (("inputs", inputs), ("targets", targets)):
            _require_finite(path, name, array)
        x = torch.from_numpy(inputs.astype(np.float32)) * self.scale
        if self._shape is not None:
            if x[0].numel() != int(np.prod(self._shape)):
                raise ConfigError(f"data.input_shape={list(self._shape)}: a sample in {path} is {tuple(x.shape[1:])}")
            x = x.reshape(len(x), *self._shape)
        return x, self._targets(path, targets)

    def _targets(self, path: Path, targets: Array) -> Tensor:
        if self.target == "class":
            return self._classes(path, targets)
        width = 1 if targets.ndim == 1 else int(np.prod(targets.shape[1:]))
        self._num_outputs = self._num_outputs or width
        if width != self._num_outputs or targets.ndim > 2:
            raise ConfigError(f"data.num_outputs={self._num_outputs}: targets in {path} have shape {targets.shape}")
        if self.target == "multilabel" and not np.isin(targets, (0, 1)).all():
            raise ConfigError(f"{path}: multilabel targets must be 0 or 1; set data.target=value for other numbers")
        return torch.from_numpy(targets.astype(np.float32))

    def _classes(self, path: Path, targets: Array) -> Tensor:
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if targets.ndim != 1 or (targets != np.round(targets)).any():
            raise ConfigError(f"{path}: classes must be whole numbers, one a sample; set data.target=value for others")
        if self._num_outputs is None:
            self._num_outputs = int(targets.max()) + 1
        wrong = np.flatnonzero((targets < 0) | (targets >= self._num_outputs))
        if len(wrong):
            raise ConfigError(
                f"{path}: sample {wrong[0]} has class {targets[wrong[0]]:g}, outside 0..{self._num_outputs - 1}; "
                "set data.num_outputs"
            )
        return torch.from_numpy(targets.astype(np.int64))


def _require_finite(path: Path, name: str, array: Array) -> None:
    if array.dtype.kind not in "fiub":
        raise ConfigError(f"{path}: {name} are of type {array.dtype}; expected numbers")
    if array.dtype.kind != "f":
        return
    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    if len(bad):
        raise ConfigError(f"{path}: {name} of {len(bad)} samples hold NaN or infinity, first in sample {bad[0]}")


def read_arrays(path: Path) -> Mapping[str, Array]:
    """Read all arrays of an npz or safetensors file; pickled objects are refused.

    Raises:
        ConfigError: The file is of another kind.
        StorageError: It is missing or damaged.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if path.suffix == ".safetensors":
            return load_file(path)
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist; set data.path, or data.train and data.val") from error
    except (OSError, ValueError, EOFError, SafetensorError, *_ZIP_DAMAGE) as error:
        raise StorageError(f"{path} is damaged or no {path.suffix} file of plain arrays ({error})") from error
    raise ConfigError(f"{path}: expected a .npz, .safetensors or .csv file")


def read_csv(path: Path) -> npt.NDArray[np.float64]:
    """Read a table of comma-separated numbers; a first line that holds no number is a heading.

    Raises:
        StorageError: The file is missing, or a line has a word or another number of columns.
    """
    try:
        text = path.read_text(encoding="utf-8")
        skip = 0 if _is_number(text.partition(",")[0]) else 1
        return np.loadtxt(text.splitlines(), delimiter=",", dtype=np.float64, ndmin=2, skiprows=skip)
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist; set data.path, or data.train and data.val") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is no table of comma-separated numbers ({error})") from error


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
