"""Data modules: real data without a hub, your own files, and noise for tests.

Names are imported when they are first used: fetching a package needs neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_opt.data.arrays import ArrayDataset, BatchDataset, TokenDataset, WindowDataset
    from lightning_opt.data.augment import (
        Compose,
        Normalize,
        RandomAffine,
        RandomErasing,
        RandomFlip,
        RandomNoise,
        RandomScale,
        RandomShift,
        Transform,
    )
    from lightning_opt.data.base import DataModule, Splits
    from lightning_opt.data.files import ArrayFiles
    from lightning_opt.data.hugging_face import HuggingFaceDataset
    from lightning_opt.data.language import Shakespeare, TextFiles
    from lightning_opt.data.packages import Member, Package
    from lightning_opt.data.randomness import Draws
    from lightning_opt.data.signals import Mnist1d
    from lightning_opt.data.spans import RandomSpan, RowTransform
    from lightning_opt.data.splits import SplitIndices, hashed_split
    from lightning_opt.data.synthetic import SyntheticImages, SyntheticTokens
    from lightning_opt.data.text import AmazonReviews, MovieReviews, Tweets
    from lightning_opt.data.tokenizers import CharTokenizer, FileTokenizer, MiniLMTokenizer, Tokenizer, WordTokenizer
    from lightning_opt.data.vision import Digits, Mnist5k

__all__ = [
    "AmazonReviews",
    "ArrayDataset",
    "ArrayFiles",
    "BatchDataset",
    "CharTokenizer",
    "Compose",
    "DataModule",
    "Digits",
    "Draws",
    "FileTokenizer",
    "HuggingFaceDataset",
    "Member",
    "MiniLMTokenizer",
    "Mnist1d",
    "Mnist5k",
    "MovieReviews",
    "Normalize",
    "Package",
    "RandomAffine",
    "RandomErasing",
    "RandomFlip",
    "RandomNoise",
    "RandomScale",
    "RandomShift",
    "RandomSpan",
    "RowTransform",
    "Shakespeare",
    "SplitIndices",
    "Splits",
    "SyntheticImages",
    "SyntheticTokens",
    "TextFiles",
    "TokenDataset",
    "Tokenizer",
    "Transform",
    "Tweets",
    "WindowDataset",
    "WordTokenizer",
    "hashed_split",
]

_HOME = {
    "arrays": ("ArrayDataset", "BatchDataset", "TokenDataset", "WindowDataset"),
    "augment": (
        "Compose",
        "Normalize",
        "RandomAffine",
        "RandomErasing",
        "RandomFlip",
        "RandomNoise",
        "RandomScale",
        "RandomShift",
        "Transform",
    ),
    "base": ("DataModule", "Splits"),
    "files": ("ArrayFiles",),
    "hugging_face": ("HuggingFaceDataset",),
    "language": ("Shakespeare", "TextFiles"),
    "packages": ("Member", "Package"),
    "randomness": ("Draws",),
    "signals": ("Mnist1d",),
    "spans": ("RandomSpan", "RowTransform"),
    "splits": ("SplitIndices", "hashed_split"),
    "synthetic": ("SyntheticImages", "SyntheticTokens"),
    "text": ("AmazonReviews", "MovieReviews", "Tweets"),
    "tokenizers": ("CharTokenizer", "FileTokenizer", "MiniLMTokenizer", "Tokenizer", "WordTokenizer"),
    "vision": ("Digits", "Mnist5k"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
