"""What all of our data modules share."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_opt.checkpointing.loader import eval_loader, train_loader
from lightning_opt.data.arrays import BatchDataset
from lightning_opt.data.fetch import default_cache_dir
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The three parts of a data set."""

    train: BatchDataset
    val: BatchDataset
    test: BatchDataset


def inputs_of(batch: Any) -> Inputs:
    """Return what a model is called with: a batch without its labels and index."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in ("labels", "index")}
    inputs: Inputs = batch[0]
    return inputs


class DataModule(pl.LightningDataModule, ABC):
    """Base of our data modules: subclasses say where the samples come from (`download`) and what they are (`load`).

    Args:
        batch_size: Training samples in a batch, on each rank.
        eval_batch_size: The same for validation and test; None: as in training.
        num_workers: Processes that prepare batches, on each rank; 0: the training process itself.
        seed: Of the order of training samples and of augmentation; never of the split.
        cache_dir: Where fetched data are kept; None: `LIGHTNING_OPT_CACHE`, else `~/.cache/lightning_opt`.

    Raises:
        ValueError: An argument is out of range; the message names it and its value.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        require_int("batch_size", batch_size, at_least=1)
        if eval_batch_size is not None:
            require_int("eval_batch_size", eval_batch_size, at_least=1)
        require_int("num_workers", num_workers, at_least=0)
        require_int("seed", seed, at_least=0)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self._splits: Splits | None = None
        self._fingerprint: str | None = None

    def download(self) -> None:
        """Fetch what `load` reads, once a machine; nothing by default."""

    @abstractmethod
    def load(self) -> Splits:
        """Read the data and return its parts. Must give the same on every rank and in every run."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Width of a model's answer: classes, labels, targets or vocabulary."""

    @property
    def variants(self) -> int:
        """Different versions of each training sample; 0: samples never change."""
        return self.splits.train.variants

    @property
    def splits(self) -> Splits:
        """The three parts; read on first use."""
        if self._splits is None:
            self._splits = self.load()
        return self._splits

    def prepare_data(self) -> None:
        self.download()

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = self.splits.train
        if len(dataset) < self.batch_size:
            raise ConfigError(f"data.batch_size={self.batch_size} is more than the {len(dataset)} training samples")
        return train_loader(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            trainer=self.trainer,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval(self.splits.test)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._eval(self.splits.test)

    def _eval(self, dataset: BatchDataset) -> DataLoader[Any]:
        return eval_loader(dataset, batch_size=self.eval_batch_size, num_workers=self.num_workers, trainer=self.trainer)

    def calibration_batches(self, n: int) -> list[Inputs]:
        """Return `n` batches of unchanged training inputs, the same in every run, for observers and export.

        Raises:
            ValueError: `n` is smaller than 1.
        """
        require_int("n", n, at_least=1)
        plain = self.splits.train.plain()
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
        order = order.repeat(-(-n * self.batch_size // len(plain)))
        chunks = order[: n * self.batch_size].split(self.batch_size)
        return [inputs_of(plain.__getitems__(chunk.tolist())) for chunk in chunks]

    def example_inputs(self, batch_size: int = 1) -> Inputs:
        """Return the inputs of the first `batch_size` unchanged training samples, repeated if there are fewer."""
        require_int("batch_size", batch_size, at_least=1)
        plain = self.splits.train.plain()
        return inputs_of(plain.__getitems__([position % len(plain) for position in range(batch_size)]))

    def fingerprint(self) -> str:
        """Return the sha256, in hex, of all samples and of what is done to them; batch sizes do not count.

        The seed counts only where training samples change at random.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for part in (self.splits.train, self.splits.val, self.splits.test):
                for item in part.content():
                    digest.update(_bytes_of(item))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def _bytes_of(item: Tensor | str) -> bytes:
    if isinstance(item, str):
        return item.encode()
    head = f"{item.dtype} {tuple(item.shape)} ".encode()
    return head + item.detach().contiguous().numpy().tobytes()


def require_int(name: str, value: Any, *, at_least: int) -> None:
    """Check that an argument is a whole number, large enough.

    Raises:
        ValueError: It is not; the message names it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, not {value!r}")


def require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check that an argument is one of a few words.

    Raises:
        ValueError: It is not; the message names the words.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
