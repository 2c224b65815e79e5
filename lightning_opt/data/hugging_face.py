"""Any data set that the `datasets` package can load, by name or from a folder."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_opt.data.arrays import ArrayDataset, BatchDataset, TokenDataset
from lightning_opt.data.base import DataModule, Splits, require_int, require_one_of
from lightning_opt.data.tokenizers import Tokenizer, WordTokenizer
from lightning_opt.errors import ConfigError, MissingExtraError, StorageError


class HuggingFaceDataset(DataModule):
    """A data set of the Hugging Face hub, or of a local folder, with a column of texts or columns of numbers.

    Needs the `datasets` package. Code that a data set brings along is not run.

    Args:
        name: Name on the hub, or a folder.
        config: Which configuration of it, where it has several.
        revision: Commit or tag on the hub; pin it, for the data to stay the same.
        text_columns: Columns of text; several are joined by a space. Empty: use `input_columns`.
        input_columns: Columns of numbers or arrays, put side by side; one column of images or arrays keeps its shape.
        label_column: Column of the target.
        target: "class": whole numbers from 0; "value": numbers.
        num_outputs: Classes or values; None: as the data set says.
        tokenizer: For texts; None: `WordTokenizer()`.
        max_length: Tokens kept of each text.
        multiple_of: Round the width of each batch of texts up to a multiple of this.
        train_split: Name of the part to train on.
        val_split: Name of the part for validation; parts of parts as `train[90%:]`.
        test_split: Name of the part for the test; None: the validation part.
        scale: Multiply numbers by this, such as 1/255 for bytes.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`.

    Raises:
        ValueError: Not exactly one of `text_columns` and `input_columns` is given, or another argument is out of range.
        MissingExtraError: `datasets` is not installed (when the data are read).
        StorageError: The data cannot be loaded (when the data are read).
        ConfigError: A column does not exist or holds something else (when the data are read).
    """

    def __init__(
        self,
        *,
        name: str,
        config: str | None = None,
        revision: str | None = None,
        text_columns: Sequence[str] = (),
        input_columns: Sequence[str] = (),
        label_column: str = "label",
        target: Literal["class", "value"] = "class",
        num_outputs: int | None = None,
        tokenizer: Tokenizer | None = None,
        max_length: int = 128,
        multiple_of: int = 8,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        scale: float = 1.0,
        batch_size: int = 32,
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
        if bool(text_columns) == bool(input_columns):
            raise ValueError(f"give text_columns or input_columns; got {list(text_columns)} and {list(input_columns)}")
        require_one_of("target", target, ("class", "value"))
        require_int("max_length", max_length, at_least=2)
        require_int("multiple_of", multiple_of, at_least=1)
        self.name, self.config, self.revision = name, config, revision
        self.text_columns, self.input_columns = tuple(text_columns), tuple(input_columns)
        self.label_column, self.target, self._num_outputs = label_column, target, num_outputs
        self.tokenizer: Tokenizer = tokenizer if tokenizer is not None else WordTokenizer()
        self.max_length, self.multiple_of, self.scale = max_length, multiple_of, scale
        self.split_names = {"train": train_split, "val": val_split, "test": test_split or val_split}

    @property
    def num_outputs(self) -> int:
        if self._num_outputs is None:
            self._num_outputs = self._count_outputs(self._part("train"))
        return self._num_outputs

    @property
    def variants(self) -> int:
        return 0

    @property
    def sequence_length(self) -> int:
        """Most tokens in a row of text."""
        return self.max_length

    @property
    def vocab_size(self) -> int:
        """Rows that a model's embedding table needs."""
        return self.tokenizer.vocab_size

    def download(self) -> None:
        for part in self.split_names:
            self._part(part)

    def load(self) -> Splits:
        parts = {part: self._part(part) for part in self.split_names}
        if self.text_columns:
            self.tokenizer.fit(self._texts(parts["train"]))
        return Splits(**{part: self._dataset(part, table) for part, table in parts.items()})

    def _part(self, part: str) -> Any:
        """Load one part as the package's own table.

        Raises:
            StorageError: It cannot be loaded.
        """
        if find_spec("datasets") is None:
            raise MissingExtraError("datasets", extra="text", needed_for="data=hugging_face")
        import datasets

        try:
            table = datasets.load_dataset(
                self.name,
                self.config,
                split=self.split_names[part],
                revision=self.revision,
                cache_dir=str(self.cache_dir / "datasets"),
            )
        except Exception as error:  # the package raises errors of many kinds of its own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StorageError(
                f"cannot load split {self.split_names[part]} of data set {self.name} ({reason})"
            ) from error
        self._check_columns(table)
        return table

    def _check_columns(self, table: Any) -> None:
        for column in (*self.text_columns, *self.input_columns, self.label_column):
            if column not in table.column_names:
                raise ConfigError(
                    f"data set {self.name} has no column '{column}'; it has {', '.join(table.column_names)}"
                )

    def _count_outputs(self, table: Any) -> int:
        if self.target == "value":
            first = np.asarray(table[self.label_column][0])
            return int(first.size)
        feature = table.features[self.label_column]
        known = getattr(feature, "num_classes", None)
        return int(known) if known else int(max(table[self.label_column])) + 1

    def _texts(self, table: Any) -> list[str]:
        columns = [table[column] for column in self.text_columns]
        return [" ".join(str(text) for text in row) for row in zip(*columns, strict=True)]

    def _dataset(self, part: str, table: Any) -> BatchDataset:
        labels = self._labels(part, table)
        if not self.text_columns:
            return ArrayDataset(self._numbers(table), labels)
        return TokenDataset(
            self.tokenizer.encode(self._texts(table), max_length=self.max_length),
            labels,
            pad_id=self.tokenizer.pad_id,
            max_length=self.max_length,
            multiple_of=self.multiple_of,
        )

    def _labels(self, part: str, table: Any) -> Tensor:
        dtype = torch.int64 if self.target == "class" else torch.float32
        try:
            labels = torch.tensor(list(table[self.label_column]), dtype=dtype)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"column '{self.label_column}' of {self.name} holds no numbers ({error})") from error
        if self.target == "class" and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_outputs:
            raise ConfigError(
                f"split {self.split_names[part]} of {self.name}: classes run from {labels.min()} to {labels.max()}, "
                f"outside 0..{self.num_outputs - 1}; unlabelled rows or a wrong data.num_outputs"
            )
        return labels

    def _numbers(self, table: Any) -> Tensor:
        columns = []
        for column in self.input_columns:
            rows = [np.asarray(row, dtype=np.float32) for row in table[column]]
            if len({row.shape for row in rows}) != 1:
                raise ConfigError(f"column '{column}' of {self.name} holds arrays of different shapes")
            columns.append(np.stack(rows))
        if len(columns) == 1:
            stacked = columns[0][:, None] if columns[0].ndim in (1, 3) else columns[0]
        else:
            stacked = np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)
        return torch.from_numpy(stacked) * self.scale
