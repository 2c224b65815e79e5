"""Makes the training data of somebody else's project resumable, where that can be done."""

import functools
import warnings
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_opt.checkpointing.loader import ResumableLoader, train_loader


def make_resumable(source: Any, *, seed: int, trainer: "pl.Trainer | None" = None) -> Any:
    """Make the training data of somebody else's data module (or DataLoader) resumable.

    The train loader is made again with the same dataset, batch size, `collate_fn`, workers and kind of order. What
    cannot be made resumable (an `IterableDataset`, a sampler or batch sampler of its own) stays as it is, with one
    warning.

    Args:
        source: A LightningDataModule (changed in place) or a DataLoader.
        seed: Of the run.
        trainer: For a DataLoader; a data module knows its own.

    Returns:
        The same data module, or a new loader.
    """
    if isinstance(source, DataLoader):
        return _remade(source, seed=seed, trainer=trainer)
    original = source.train_dataloader

    @functools.wraps(original)
    def train_dataloader() -> Any:
        loaders = original()
        if isinstance(loaders, DataLoader):
            return _remade(loaders, seed=seed, trainer=getattr(source, "trainer", None) or trainer)
        _warn_not_exact(f"train_dataloader() returns a {type(loaders).__name__}, not one DataLoader")
        return loaders

    source.train_dataloader = train_dataloader
    return source


def _remade(loader: DataLoader[Any], *, seed: int, trainer: "pl.Trainer | None") -> DataLoader[Any]:
    if isinstance(loader, ResumableLoader):
        return loader
    shuffle = _shuffles(loader)
    if isinstance(shuffle, str):
        _warn_not_exact(shuffle)
        return loader
    kwargs: dict[str, Any] = {
        name: getattr(loader, name)
        for name in ("num_workers", "pin_memory", "timeout", "worker_init_fn", "persistent_workers", "prefetch_factor")
    }
    return train_loader(
        loader.dataset,
        batch_size=int(loader.batch_size or 1),
        seed=seed,
        shuffle=shuffle,
        drop_last=loader.drop_last,
        collate_fn=loader.collate_fn,
        multiprocessing_context=loader.multiprocessing_context,
        trainer=trainer,
        **kwargs,
    )


def _shuffles(loader: DataLoader[Any]) -> bool | str:
    """Whether the loader draws a new order each epoch, or the reason why it cannot be made again."""
    if isinstance(loader.dataset, IterableDataset):
        return f"{type(loader.dataset).__name__} is an IterableDataset"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"the train loader has a batch sampler of its own ({type(loader.batch_sampler).__name__})"
    sampler = loader.sampler
    if type(sampler) is SequentialSampler:
        return False
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset):  # type: ignore[arg-type]
        return True
    if type(sampler) is DistributedSampler:
        return bool(sampler.shuffle)
    return f"the train loader has a sampler of its own ({type(sampler).__name__})"


def _warn_not_exact(why: str) -> None:
    warnings.warn(f"A resume inside an epoch will not be bit-exact: {why}", stacklevel=3)
