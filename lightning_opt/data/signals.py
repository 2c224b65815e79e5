"""Short signals: MNIST-1D, made on the spot."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lightning_opt.data.arrays import ArrayDataset
from lightning_opt.data.augment import Transform
from lightning_opt.data.base import DataModule, Splits, require_int
from lightning_opt.data.splits import check_fractions, hashed_split

Floats = npt.NDArray[np.float64]

# One row a digit: twelve heights that sketch its outline, as published with the data set.
_OUTLINES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_TEMPLATE_LENGTH, _LEAST_PADDING, _MOST_PADDING, _SIGNAL_LENGTH = 12, 36, 60, 40
_WIDE = _TEMPLATE_LENGTH + _MOST_PADDING
_SCALE, _MOST_TRANSLATION, _SHEAR = 0.4, 48, 0.75
_CORRELATED_NOISE, _WHITE_NOISE, _NOISE_SIGMA = 0.25, 0.02, 2.0


class Mnist1d(DataModule):
    """MNIST-1D: ten classes of signals of 40 numbers, on which small networks differ widely.

    Made by the published recipe (Greydanus and Kobak 2020, arXiv 2011.14439, appendix A): a template of a digit is
    padded, stretched, scaled, moved, given correlated and white noise, sheared, and sampled at 40 points. With the
    defaults this is the published set: 4,000 samples for training, of which `val_fraction` is kept for validation, and
    1,000 for the test.

    Args:
        num_samples: Training and test samples together, a multiple of 10.
        generator_seed: Of the samples themselves; 42 gives the published set.
        test_fraction: Share of all samples for the test: the last ones, as published.
        val_fraction: Share of the remaining ones for validation.
        augment: Random change of training signals; None: they never change.
        variants: With `augment`: different versions of each signal; epoch e trains on version e % variants.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`; nothing is fetched or kept.
    """

    input_shape = (1, _SIGNAL_LENGTH)

    def __init__(
        self,
        *,
        num_samples: int = 5000,
        generator_seed: int = 42,
        test_fraction: float = 0.2,
        val_fraction: float = 0.125,
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
        require_int("num_samples", num_samples, at_least=10)
        if num_samples % len(_OUTLINES):
            raise ValueError(f"num_samples must be a multiple of 10, not {num_samples}")
        require_int("generator_seed", generator_seed, at_least=0)
        require_int("variants", variants, at_least=1)
        check_fractions(val_fraction, test_fraction)
        self.num_samples, self.generator_seed = num_samples, generator_seed
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.augment, self._variants = augment, variants if augment is not None else 0

    @property
    def num_outputs(self) -> int:
        return len(_OUTLINES)

    @property
    def variants(self) -> int:
        return self._variants

    def load(self) -> Splits:
        signals, classes = generate_mnist1d(self.num_samples, seed=self.generator_seed)
        x = torch.from_numpy(signals.astype(np.float32))[:, None, :]
        y = torch.from_numpy(classes)
        known = int(self.num_samples * (1.0 - self.test_fraction))
        parts = hashed_split(
            [row.tobytes() for row in x[:known].numpy()],
            val_fraction=self.val_fraction,
            test_fraction=0.0,
            strata=y[:known].tolist(),
        )
        train = ArrayDataset(
            x[parts.train], y[parts.train], transform=self.augment, seed=self.seed, variants=self._variants
        )
        return Splits(
            train=train, val=ArrayDataset(x[parts.val], y[parts.val]), test=ArrayDataset(x[known:], y[known:])
        )


def generate_mnist1d(num_samples: int = 5000, *, seed: int = 42) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Make MNIST-1D signals `(N, 40)`, of zero mean and unit variance over the whole set, and their classes `(N,)`.

    Random numbers are drawn in the published order, sample by sample; everything else is done for all at once.
    """
    rng = np.random.RandomState(seed)
    classes = np.repeat(np.arange(len(_OUTLINES)), num_samples // len(_OUTLINES))
    paddings, moves = np.empty(num_samples, dtype=np.int64), np.empty(num_samples, dtype=np.int64)
    scales, shears = np.empty(num_samples), np.empty(num_samples)
    noises = np.empty((2, num_samples, _WIDE))
    for number in range(num_samples):
        paddings[number] = _LEAST_PADDING + int(rng.rand() * (_MOST_PADDING - _LEAST_PADDING + 1))
        scales[number] = 1.0 + _SCALE * (rng.rand() - 0.5)
        moves[number] = rng.choice(_MOST_TRANSLATION)
        noises[0, number], noises[1, number] = rng.randn(_WIDE), rng.randn(_WIDE)
        shears[number] = _SHEAR * (rng.rand() - 0.5)
    signals = _stretched(_templates()[classes] + 1e-8, paddings) * scales[:, None]
    signals = signals[np.arange(num_samples)[:, None], (np.arange(_WIDE)[None, :] - moves[:, None]) % _WIDE]
    signals = np.where(signals != 0, signals, _smoothed(_CORRELATED_NOISE * noises[0]))
    signals = signals + _WHITE_NOISE * noises[1] - shears[:, None] * np.linspace(-0.5, 0.5, _WIDE)
    signals = _resampled(signals, _SIGNAL_LENGTH)
    order = rng.permutation(num_samples)
    signals = signals[order]
    return (signals - signals.mean()) / signals.std(), classes[order]


def _templates() -> Floats:
    """Return the outlines as `(10, 12)` curves of equal variance that begin at 0."""
    outlines = np.asarray(_OUTLINES, dtype=np.float64)
    outlines = outlines - outlines.mean(axis=1, keepdims=True)
    outlines = outlines / outlines.std(axis=1, keepdims=True)
    return (outlines - outlines[:, :1]) / 6.0


def _stretched(templates: Floats, paddings: npt.NDArray[np.int64]) -> Floats:
    """Fill each row with its own number of zeros, then stretch all to one length."""
    result = np.empty((len(templates), _WIDE))
    for padding in np.unique(paddings):
        rows = paddings == padding
        result[rows] = _resampled(np.pad(templates[rows], ((0, 0), (0, int(padding)))), _WIDE)
    return result


def _resampled(signals: Floats, length: int) -> Floats:
    """Read `(N, L)` signals at `length` evenly spaced points, linearly between their own."""
    have, want = np.linspace(0.0, 1.0, signals.shape[1]), np.linspace(0.0, 1.0, length)
    right = np.clip(np.searchsorted(have, want), 1, len(have) - 1)
    left = right - 1
    slope = (signals[:, right] - signals[:, left]) / (have[right] - have[left])
    return slope * (want - have[left]) + signals[:, left]


def _smoothed(noise: Floats) -> Floats:
    """Blur `(N, L)` noise with a Gaussian cut at four deviations, mirrored at the ends."""
    radius = int(4.0 * _NOISE_SIGMA + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / _NOISE_SIGMA) ** 2)
    padded = np.pad(noise, ((0, 0), (radius, radius)), mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis=1)
    return windows @ (kernel / kernel.sum())
