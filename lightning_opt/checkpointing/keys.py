"""Which samples make a batch, and what random numbers they draw: pure functions of `(seed, epoch, index)`."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

SampleKey = tuple[int, int]
"""`(epoch, index)`: what a batch sampler yields and a keyed dataset is asked for."""

Position = Callable[[], tuple[int, int]]
"""Answers `(epoch, batches of it that were already yielded)`."""

_MASK_64 = (1 << 64) - 1


def mix(*values: int) -> int:
    """Hash integers into 64 bits (the splitmix64 finaliser, chained): the same answer on every machine and version.

    Example:
        >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
        (True, False)
    """
    state = 0
    for value in values:
        state = (state + (value & _MASK_64) + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state


def seed_everything_cheaply(seed: int) -> None:
    """Seed python's, numpy's and torch's CPU generator; accelerator generators are left alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed >> 1)


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put python's, numpy's and torch's CPU generator back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Yields batches of `(epoch, index)` keys, starting wherever `position` says when the first one is asked for.

    Global batch `k` is `order[k * W * b : (k + 1) * W * b]` for `W` ranks with batch `b`, and rank `r` takes the
    `r`-th part of it, so that `W` ranks see what one process with batch `W * b` sees. An incomplete last global batch
    is split as evenly as possible; one with fewer samples than ranks is merged into the batch before it, so that
    every rank always has the same number of batches.

    Args:
        num_samples: Samples in the data set.
        batch_size: Samples a batch and rank.
        seed: With the epoch, the only source of the order.
        shuffle: Whether to draw a new permutation each epoch.
        drop_last: Whether to leave out an incomplete last global batch.
        rank: Of this process among the data-parallel ones.
        world_size: Number of data-parallel processes.
        position: Read at the first `next`, never earlier: a trainer knows its progress only by then.

    Raises:
        ValueError: If a size is not positive, or no rank-complete batch can be made.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
        position: Position | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not one of {world_size} ranks")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self.position: Position = position or (lambda: (0, 0))
        self._length = self._count_batches()

    @property
    def global_batch_size(self) -> int:
        """Samples that all ranks together take in one full batch."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, yielded = normalized(self.position(), length=len(self))
        order = self.order(epoch)
        for number in range(yielded, len(self)):
            yield [(epoch, index) for index in order[slice(*self._bounds(number))].tolist()]

    def order(self, epoch: int) -> torch.Tensor:
        """Return the `(num_samples,)` order of an epoch, the same on every rank."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
        return torch.randperm(self.num_samples, generator=generator)

    def _count_batches(self) -> int:
        full, rest = divmod(self.num_samples, self.global_batch_size)
        batches = full + int(not self.drop_last and rest >= self.world_size)
        if batches == 0:
            wanted = self.global_batch_size if self.drop_last else self.world_size
            raise ValueError(
                f"{self.num_samples} samples make no batch: batch_size={self.batch_size} on {self.world_size} rank(s) "
                f"with drop_last={self.drop_last} needs at least {wanted}"
            )
        return batches

    def _bounds(self, number: int) -> tuple[int, int]:
        first = number * self.global_batch_size
        last = min(first + self.global_batch_size, self.num_samples)
        if number == len(self) - 1 and not self.drop_last:
            last = self.num_samples
        size = last - first
        return first + size * self.rank // self.world_size, first + size * (self.rank + 1) // self.world_size


def normalized(position: tuple[int, int], *, length: int) -> tuple[int, int]:
    """Turn "all of epoch e" into "nothing of epoch e + 1", so that no epoch is silently skipped or shortened."""
    epoch, yielded = position
    return (epoch + 1, 0) if yielded >= length else (epoch, yielded)


class KeyedSamples(list[Any]):
    """The samples of a batch, with the key of the first one, from which a random `collate_fn` is seeded."""

    key: SampleKey = (0, 0)


class SeededDataset(Dataset[Any]):
    """Makes any map-style dataset replayable: its random numbers depend on `(seed, epoch, index)` alone.

    Python's, numpy's and torch's generators are seeded around the inner `__getitem__` and put back afterwards.

    Args:
        dataset: Anything with `__getitem__(int)` and `__len__`.
        seed: Of the run.
    """

    def __init__(self, dataset: Any, *, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> KeyedSamples:
        samples = KeyedSamples()
        samples.key = keys[0]
        with preserved_rng():
            for epoch, index in keys:
                seed_everything_cheaply(mix(self.seed, epoch, index))
                samples.append(self.dataset[index])
        return samples


class SeededCollate:
    """Makes a `collate_fn` that draws random numbers (mixing of samples, random padding) replayable."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], *, seed: int) -> None:
        self.collate_fn, self.seed = collate_fn, seed

    def __call__(self, samples: KeyedSamples) -> Any:
        with preserved_rng():
            seed_everything_cheaply(mix(self.seed, *samples.key, 1))
            return self.collate_fn(list(samples))
