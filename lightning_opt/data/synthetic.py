"""Seeded noise in the shape of data: for tests and for measuring speed, not for measuring quality."""

from pathlib import Path

import torch

from lightning_opt.data.arrays import ArrayDataset, TokenDataset
from lightning_opt.data.augment import Transform
from lightning_opt.data.base import DataModule, Splits, require_int


class SyntheticImages(DataModule):
    """Random images around one random centre for each class, so that a network can learn them.

    Args:
        num_train: Training images.
        num_eval: Images of validation and of the test, each.
        num_classes: How many classes.
        channels: Of an image.
        size: Height and width in pixels.
        noise: Standard deviation of an image around its class's centre, whose own is 1.
        data_seed: Of the images themselves.
        augment: Random change of training images; None: they never change.
        variants: With `augment`: different versions of each image.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`; nothing is fetched or kept.
    """

    def __init__(
        self,
        *,
        num_train: int = 256,
        num_eval: int = 64,
        num_classes: int = 10,
        channels: int = 3,
        size: int = 32,
        noise: float = 1.0,
        data_seed: int = 0,
        augment: Transform | None = None,
        variants: int = 8,
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
        sizes = {"num_train": num_train, "num_eval": num_eval, "channels": channels, "size": size, "variants": variants}
        for name, value in sizes.items():
            require_int(name, value, at_least=1)
        require_int("num_classes", num_classes, at_least=2)
        require_int("data_seed", data_seed, at_least=0)
        self.num_train, self.num_eval, self.num_classes = num_train, num_eval, num_classes
        self.input_shape, self.noise, self.data_seed = (channels, size, size), noise, data_seed
        self.augment, self._variants = augment, variants if augment is not None else 0

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    @property
    def variants(self) -> int:
        return self._variants

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(self.data_seed)
        total = self.num_train + 2 * self.num_eval
        centres = torch.randn(self.num_classes, *self.input_shape, generator=generator)
        y = torch.randint(self.num_classes, (total,), generator=generator)
        x = centres[y] + self.noise * torch.randn(total, *self.input_shape, generator=generator)
        sizes = [self.num_train, self.num_eval, self.num_eval]
        (train_x, val_x, test_x), (train_y, val_y, test_y) = x.split(sizes), y.split(sizes)
        train = ArrayDataset(train_x, train_y, transform=self.augment, seed=self.seed, variants=self._variants)
        return Splits(train=train, val=ArrayDataset(val_x, val_y), test=ArrayDataset(test_x, test_y))


class SyntheticTokens(DataModule):
    """Random token sequences of different lengths; the class is told by which part of the vocabulary prevails.

    Args:
        num_train: Training sequences.
        num_eval: Sequences of validation and of the test, each.
        num_classes: How many classes; each prefers its own part of the vocabulary.
        vocab_size: Tokens, of which 0 fills short rows.
        max_length: Longest sequence; the shortest is half as long.
        fixed_length: Make every sequence and batch `max_length` wide.
        data_seed: Of the sequences themselves.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`; nothing is fetched or kept.
    """

    def __init__(
        self,
        *,
        num_train: int = 256,
        num_eval: int = 64,
        num_classes: int = 2,
        vocab_size: int = 1000,
        max_length: int = 32,
        fixed_length: bool = False,
        data_seed: int = 0,
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
        for name, value in {"num_train": num_train, "num_eval": num_eval}.items():
            require_int(name, value, at_least=1)
        require_int("num_classes", num_classes, at_least=2)
        require_int("max_length", max_length, at_least=2)
        require_int("vocab_size", vocab_size, at_least=num_classes + 1)
        require_int("data_seed", data_seed, at_least=0)
        self.num_train, self.num_eval, self.num_classes = num_train, num_eval, num_classes
        self.vocab_size, self.max_length, self.fixed_length = vocab_size, max_length, fixed_length
        self.data_seed = data_seed

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    @property
    def variants(self) -> int:
        return 0

    @property
    def sequence_length(self) -> int:
        """Most tokens in a row."""
        return self.max_length

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(self.data_seed)
        parts = [self._part(size, generator) for size in (self.num_train, self.num_eval, self.num_eval)]
        return Splits(train=parts[0], val=parts[1], test=parts[2])

    def _part(self, size: int, generator: torch.Generator) -> TokenDataset:
        labels = torch.randint(self.num_classes, (size,), generator=generator)
        shortest = self.max_length if self.fixed_length else max(1, self.max_length // 2)
        lengths = torch.randint(shortest, self.max_length + 1, (size,), generator=generator)
        band = (self.vocab_size - 1) // self.num_classes
        own = torch.randint(band, (size, self.max_length), generator=generator) + labels[:, None] * band + 1
        anything = torch.randint(1, self.vocab_size, (size, self.max_length), generator=generator)
        tokens = torch.where(torch.rand(size, self.max_length, generator=generator) < 0.5, own, anything)
        rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return TokenDataset(rows, labels, pad_id=0, max_length=self.max_length, fixed_length=self.fixed_length)
