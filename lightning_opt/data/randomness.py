"""Random numbers that are a pure function of what they are for.

A draw depends on (seed, variant, sample index, stream, position) and on nothing else: not on the worker, the batch, the
order, or what was drawn before. So an augmented sample can be made again at any time, also by a teacher's cache.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

Words = npt.NDArray[np.uint64]


def mix(words: Words) -> Words:
    """Scramble 64-bit words: the output function of SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def splitmix64(states: Words, count: int) -> Words:
    """Return the first `count` outputs of SplitMix64 for each state: `(B,)` -> `(B, count)`."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    return mix(states[:, None] + steps[None, :])


def _absorb(states: Words, values: Words | np.uint64) -> Words:
    """Fold a value into each state so that neighbouring values give unrelated states."""
    return mix((states ^ mix(np.atleast_1d(values) + np.uint64(_GAMMA))) + np.uint64(_GAMMA))


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of samples, one row a sample.

    Asking twice gives the same numbers; `fork` gives other ones. A transform that needs several kinds of numbers forks
    once for each.

    Args:
        states: `(B,)` uint64, one a sample.
    """

    states: Words

    @classmethod
    def of(cls, *, seed: int, variants: npt.ArrayLike, indices: npt.ArrayLike) -> "Draws":
        """Return the draws of samples `indices` (B,) in their versions `variants` (B,)."""
        start = np.full(1, seed & _MASK, dtype=np.uint64)
        state = _absorb(start, np.asarray(variants, dtype=np.int64).astype(np.uint64))
        return cls(_absorb(state, np.asarray(indices, dtype=np.int64).astype(np.uint64)))

    def fork(self, stream: int) -> "Draws":
        """Return independent draws for the same samples."""
        return replace(self, states=_absorb(self.states, np.uint64(stream)))

    def uniform(self, count: int = 1) -> Tensor:
        """Return `(B, count)` float32 numbers, uniform on [0, 1)."""
        words = splitmix64(self.states, count) >> np.uint64(40)
        return torch.from_numpy(words.astype(np.float32) * np.float32(2.0**-24))

    def normal(self, count: int = 1) -> Tensor:
        """Return `(B, count)` float32 standard normal numbers (Box and Muller, 1958)."""
        half = (count + 1) // 2
        flat = self.uniform(2 * half)
        radius = (-2.0 * torch.log(1.0 - flat[:, :half])).sqrt()
        angle = flat[:, half:] * (2.0 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]

    def __len__(self) -> int:
        return len(self.states)
