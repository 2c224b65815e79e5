"""Training data that can be stopped after any batch and continued with the next one, bit for bit.

Which samples make batch `k` of epoch `e`, and every random number that a sample's augmentation draws, is a pure
function of `(seed, epoch, index)`. Nothing has to be replayed: a resumed run asks its trainer for the position
`(epoch, batches yielded)` and goes on from there, with any number of workers.

```python
loader = train_loader(dataset, batch_size=32, seed=1, trainer=self.trainer)  # in a LightningDataModule
```
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    default_collate,
)

from lightning_opt.checkpointing.keys import (
    EpochBatchSampler,
    KeyedSamples,
    Position,
    SampleKey,
    SeededCollate,
    SeededDataset,
    mix,
    normalized,
)

__all__ = [
    "EpochBatchSampler",
    "KeyedSamples",
    "Position",
    "ResumableLoader",
    "SampleKey",
    "SeededCollate",
    "SeededDataset",
    "eval_loader",
    "mix",
    "takes_keys",
    "train_loader",
    "trainer_position",
]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose position belongs to a trainer's progress (or, without one, to itself).

    Lightning may or may not hand a loader its saved state (it does not at the end of an epoch, nor after a scheduler
    asked for the number of steps), so with a trainer the state is only compared, never relied on.

    Args:
        dataset: One that takes keys: a `SeededDataset`, or one with its own `__getitems__(keys)`.
        batch_sampler: Gives the keys.
        trainer: Whose progress says where to go on.
        **kwargs: For the DataLoader.
    """

    def __init__(
        self, dataset: Any, *, batch_sampler: EpochBatchSampler, trainer: "pl.Trainer | None" = None, **kwargs: Any
    ) -> None:
        # a generator of its own: making an iterator would otherwise draw from the global one
        generator = torch.Generator().manual_seed(mix(batch_sampler.seed, -1) >> 1)
        super().__init__(dataset, batch_sampler=batch_sampler, generator=generator, **kwargs)
        self.keys = batch_sampler
        self.trainer = trainer
        self._epoch, self._yielded, self._started = 0, 0, False
        batch_sampler.position = self.position

    def position(self) -> tuple[int, int]:
        """Return `(epoch, batches yielded)` from which a new iterator starts."""
        if self.trainer is None:
            return self._epoch, self._yielded
        return trainer_position(self.trainer, loader=self)

    def __iter__(self) -> Any:
        if self.trainer is not None:
            return super().__iter__()
        if self._started:
            self._epoch, self._yielded = self._epoch + 1, 0
        self._started = False
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._started = True
            self._yielded += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position, and what must be equal for it to mean the same samples."""
        epoch, yielded = normalized(self.position(), length=len(self))
        return {"epoch": epoch, "yielded": yielded, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take the position over (without a trainer) and warn of other data, seed or batch size."""
        changed = [f"{k}: {state_dict[k]} -> {v}" for k, v in self._identity().items() if state_dict.get(k, v) != v]
        if changed:
            warnings.warn(f"Resuming is not bit-exact: the training data changed ({', '.join(changed)})", stacklevel=2)
        self._epoch, self._yielded, self._started = state_dict["epoch"], state_dict["yielded"], False

    def _identity(self) -> dict[str, int]:
        keys = self.keys
        return {"seed": keys.seed, "num_samples": keys.num_samples, "global_batch_size": keys.global_batch_size}


def trainer_position(trainer: "pl.Trainer", *, loader: DataLoader[Any]) -> tuple[int, int]:
    """Return `(epoch, batches yielded)` of a trainer, for the loader that it trains from.

    Another loader of the same trainer (one made to calibrate on training data, say) starts at the epoch's first batch.
    """
    fit = trainer.fit_loop
    epochs, combined = cast(_ProcessedTracker, fit.epoch_progress.current), fit._combined_loader
    owned = combined is not None and any(one is loader for one in combined.flattened)
    inside_epoch = epochs.ready > epochs.processed
    yielded = fit.epoch_loop.batch_progress.current.ready if owned and inside_epoch else 0
    limit = (combined.limits or [float("inf")])[0] if combined is not None else float("inf")
    return normalized((epochs.processed, yielded), length=int(min(len(loader), limit or len(loader))))


def train_loader(
    dataset: Any,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    trainer: "pl.Trainer | None" = None,
    **kwargs: Any,
) -> ResumableLoader:
    """Make a resumable training loader over a map-style dataset.

    A dataset with its own `__getitems__(keys)` gets the `(epoch, index)` keys and returns a ready batch; any other one
    is asked sample by sample, seeded. Run the trainer with `use_distributed_sampler=False`.

    Args:
        dataset: Map-style.
        batch_size: Samples a batch and rank.
        seed: Of the run.
        num_workers: Processes that load; any number gives the same batches.
        shuffle: Whether to draw a new order each epoch (never while a trainer overfits a few batches).
        drop_last: Whether to leave out an incomplete last batch.
        collate_fn: Makes a batch of a list of samples.
        trainer: Whose progress says where to go on after a resume.
        **kwargs: For the DataLoader (`pin_memory`, `persistent_workers`, ...).

    Raises:
        ValueError: If the dataset is an `IterableDataset`, or too small for one batch.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{type(dataset).__name__} is an IterableDataset: only map-style datasets can be resumed")
    overfits = trainer is not None and getattr(trainer, "overfit_batches", 0) > 0
    rank, world_size = data_ranks(trainer)
    keys = EpochBatchSampler(
        len(dataset),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle and not overfits,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
    )
    dataset, collate_fn = _seeded(dataset, seed=seed, collate_fn=collate_fn)
    kwargs |= {"num_workers": num_workers, "collate_fn": collate_fn, "trainer": trainer}
    return ResumableLoader(dataset, batch_sampler=keys, **kwargs)


def eval_loader(
    dataset: Any,
    *,
    batch_size: int,
    seed: int = 0,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    trainer: "pl.Trainer | None" = None,
    **kwargs: Any,
) -> DataLoader[Any]:
    """Make a loader that visits each sample exactly once over all ranks, in order, with equally many batches on each.

    Args:
        dataset: Map-style.
        batch_size: Samples a batch and rank.
        seed: Fixes what little randomness an evaluation dataset may have; the same in every epoch.
        num_workers: Processes that load.
        collate_fn: Makes a batch of a list of samples.
        trainer: Says which rank this is; without one, `torch.distributed` does.
        **kwargs: For the DataLoader.

    Raises:
        ValueError: If there are fewer samples than ranks.
    """
    rank, world_size = data_ranks(trainer)
    keys = EpochBatchSampler(
        len(dataset), batch_size=batch_size, seed=seed, shuffle=False, drop_last=False, rank=rank, world_size=world_size
    )
    dataset, collate_fn = _seeded(dataset, seed=seed, collate_fn=collate_fn)
    generator = torch.Generator().manual_seed(mix(seed, -2) >> 1)
    kwargs |= {"num_workers": num_workers, "collate_fn": collate_fn, "generator": generator}
    return DataLoader(dataset, batch_sampler=keys, **kwargs)


def data_ranks(trainer: "pl.Trainer | None" = None) -> tuple[int, int]:
    """Return `(rank, world size)` among the processes that see different data."""
    chosen = trainer.distributed_sampler_kwargs if trainer is not None else None
    if chosen is not None:
        return int(chosen["rank"]), int(chosen["num_replicas"])
    if trainer is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def takes_keys(dataset: Any) -> bool:
    """Whether `dataset.__getitems__` takes `(epoch, index)` keys and returns a ready batch.

    A class attribute `takes_keys` decides; without one, a `__getitems__` counts unless it is one of those (torch's
    `Subset`, Hugging Face `datasets`) that take integers and return a list of samples.
    """
    said = getattr(dataset, "takes_keys", None)
    if said is not None:
        return bool(said)
    foreign = isinstance(dataset, Subset) or type(dataset).__module__.partition(".")[0] in ("torch", "datasets")
    return hasattr(dataset, "__getitems__") and not foreign


def _seeded(
    dataset: Any, *, seed: int, collate_fn: Callable[[list[Any]], Any] | None
) -> tuple[Any, Callable[[Any], Any]]:
    if takes_keys(dataset):
        return dataset, collate_fn or as_is
    return SeededDataset(dataset, seed=seed), SeededCollate(collate_fn or default_collate, seed=seed)


def as_is(batch: Any) -> Any:
    """Return a batch that is ready as it is."""
    return batch
