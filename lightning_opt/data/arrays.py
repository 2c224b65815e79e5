"""Data sets that lie in memory and hand out whole batches at once."""

from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_opt.data.augment import Transform
from lightning_opt.data.randomness import Draws
from lightning_opt.data.spans import RowTransform

# What samplers hand over: (epoch, index), or a bare index, which stands for epoch 0.
Key: TypeAlias = tuple[int, int] | int


def split_keys(keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
    """Return the epochs `(B,)` and the indices `(B,)` of keys, both int64."""
    pairs = [(int(key[0]), int(key[1])) if isinstance(key, tuple | list) else (0, int(key)) for key in keys]
    table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return table[:, 0], table[:, 1]


class BatchDataset(Dataset[Any]):
    """Base of data sets that return ready batches from lists of keys.

    Attributes:
        seed: Of the draws.
        variants: How many versions of each sample there are; 0: one, which never changes.
    """

    takes_keys = True  # tells the loaders that `__getitems__` wants the keys and gives a batch
    seed: int = 0
    variants: int = 0

    def __len__(self) -> int:
        raise NotImplementedError  # pragma: no cover - abstract

    def batch(self, indices: Tensor, draws: Draws | None) -> Any:
        """Return the batch of samples `indices` (B,), changed by `draws` where they are given."""
        raise NotImplementedError  # pragma: no cover - abstract

    def content(self) -> Iterable[Tensor | str]:
        """Give everything that the samples are made of, for the fingerprint."""
        raise NotImplementedError  # pragma: no cover - abstract

    def plain(self) -> Self:
        """Return the same samples without any random change."""
        twin = copy(self)
        twin.variants = 0
        return twin

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        epochs, indices = split_keys(keys)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"sample {int(indices.max())} of a data set of {len(self)}")
        if not self.variants:
            return self.batch(indices, None)
        variants = (epochs % self.variants).numpy()
        return self.batch(indices, Draws.of(seed=self.seed, variants=variants, indices=indices.numpy()))

    def __getitem__(self, key: Key) -> Any:
        batch = self.__getitems__([key])
        if isinstance(batch, dict):
            return {name: value[0] for name, value in batch.items()}
        return tuple(part[0] for part in batch)


class ArrayDataset(BatchDataset):
    """Inputs and targets in tensors; a batch is `(x, y, index)`.

    Args:
        inputs: `(N, ...)`.
        targets: `(N,)` or `(N, D)`.
        transform: Random change of training batches, `transform(x, draws)`. Needs `variants`.
        finish: Fixed last step, `finish(x)`, such as a normalisation, for what the transform must come before.
        seed: Of the transform's draws.
        variants: Different versions of each sample: epoch e trains on version e % variants.

    Raises:
        ValueError: Lengths differ, or exactly one of `transform` and `variants` is given.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        transform: Transform | None = None,
        finish: Any = None,
        seed: int = 0,
        variants: int = 0,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"inputs hold {len(inputs)} samples and targets {len(targets)}")
        if (transform is None) != (variants == 0):
            raise ValueError(f"transform and variants go together; got transform={transform}, variants={variants}")
        self.inputs, self.targets = inputs, targets
        self.transform, self.finish = transform, finish
        self.seed, self.variants = seed, variants

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor, Tensor]:
        x = self.inputs[indices]
        if draws is not None and self.transform is not None:
            x = self.transform(x, draws)
        if self.finish is not None:
            x = self.finish(x)
        return x, self.targets[indices], indices

    def content(self) -> Iterable[Tensor | str]:
        yield self.inputs
        yield self.targets
        yield f"{self.finish!r}"
        if self.variants:
            yield f"{self.transform!r} seed={self.seed} variants={self.variants}"


class TokenDataset(BatchDataset):
    """Token sequences of different lengths with a label each; a batch is a dict.

    Batches hold `input_ids` and `attention_mask` `(B, T)`, `labels` and `index`. T is the longest of the batch, rounded
    up, or the fixed length.

    Args:
        sequences: Token numbers of each sample.
        labels: `(N,)` or `(N, D)`.
        pad_id: Token that fills short rows.
        max_length: Longest row; longer sequences must have been cut.
        multiple_of: Round the width of a batch up to a multiple of this.
        fixed_length: Make every batch `max_length` wide.
        transform: Random change of training rows, `transform(ids, lengths, draws) -> (ids, lengths)`. Needs `variants`.
        seed: Of the transform's draws.
        variants: Different versions of each sample: epoch e trains on version e % variants.

    Raises:
        ValueError: Exactly one of `transform` and `variants` is given.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        labels: Tensor,
        *,
        pad_id: int,
        max_length: int,
        multiple_of: int = 8,
        fixed_length: bool = False,
        transform: RowTransform | None = None,
        seed: int = 0,
        variants: int = 0,
    ) -> None:
        if (transform is None) != (variants == 0):
            raise ValueError(f"transform and variants go together; got transform={transform}, variants={variants}")
        self.lengths = torch.tensor([len(row) for row in sequences], dtype=torch.int64)
        table = np.full((len(sequences), max_length), pad_id, dtype=np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence)] = sequence
        self.ids, self.labels = torch.from_numpy(table), labels
        self.max_length, self.multiple_of, self.fixed_length = max_length, multiple_of, fixed_length
        self.transform, self.seed, self.variants, self.pad_id = transform, seed, variants, pad_id

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        ids, lengths = self.ids[indices], self.lengths[indices]
        if draws is not None and self.transform is not None:
            ids, lengths = self.transform(ids, lengths, draws)
            ids = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], self.pad_id)
        width = self.max_length
        if not self.fixed_length:
            width = min(width, -(-int(lengths.max()) // self.multiple_of) * self.multiple_of)
        return {
            "input_ids": ids[:, :width].long(),
            "attention_mask": (torch.arange(width)[None, :] < lengths[:, None]).long(),
            "labels": self.labels[indices],
            "index": indices,
        }

    def content(self) -> Iterable[Tensor | str]:
        yield self.ids
        yield self.lengths
        yield self.labels
        yield f"max_length={self.max_length} multiple_of={self.multiple_of} fixed_length={self.fixed_length}"
        if self.variants:
            yield f"{self.transform!r} seed={self.seed} variants={self.variants}"


class WindowDataset(BatchDataset):
    """Windows of one long token stream, for predicting the next token; a batch is a dict.

    Window i begins at `i * context_length`, so the windows of an epoch meet without overlap and every token but the
    first is a label exactly once. With `variants`, a window begins up to `context_length - 1` tokens later, by its own
    draw. Where the stream ends, positions are filled with token 0 and label -100.

    Args:
        stream: `(N,)` tokens, N >= 2.
        context_length: Tokens in a window, T.
        seed: Of the windows' draws.
        variants: Different sets of windows: epoch e trains on version e % variants; 0: always the same windows.

    Raises:
        ValueError: The stream has fewer than 2 tokens.
    """

    def __init__(self, stream: Tensor, *, context_length: int, seed: int = 0, variants: int = 0) -> None:
        if len(stream) < 2:
            raise ValueError(f"a text of {len(stream)} tokens has nothing to predict; at least 2 are needed")
        self.length = len(stream)
        self.stream = torch.cat([stream, stream.new_zeros(2 * context_length)])
        self.context_length, self.seed, self.variants = context_length, seed, variants

    def __len__(self) -> int:
        return -(-(self.length - 1) // self.context_length)

    def batch(self, indices: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        starts = indices * self.context_length
        if draws is not None:
            offsets = (draws.uniform()[:, 0].double() * self.context_length).floor().long()
            starts = torch.minimum(starts + offsets, torch.tensor(max(0, self.length - 1 - self.context_length)))
        places = starts[:, None] + torch.arange(self.context_length + 1)
        tokens = self.stream[places].long()
        labels = tokens[:, 1:].masked_fill(places[:, 1:] >= self.length, -100)
        return {"input_ids": tokens[:, :-1], "labels": labels, "index": indices}

    def content(self) -> Iterable[Tensor | str]:
        yield self.stream
        yield f"context_length={self.context_length}"
        if self.variants:
            yield f"seed={self.seed} variants={self.variants}"
