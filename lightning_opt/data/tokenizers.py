"""From text to token numbers."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_opt.data import fetch
from lightning_opt.data.packages import MINILM_TOKENIZER
from lightning_opt.errors import ConfigError, LightningOptError, MissingExtraError, StorageError


class Tokenizer(Protocol):
    """What the text data modules need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs."""
        ...

    @property
    def pad_id(self) -> int:
        """The token that fills short rows."""
        ...

    def fit(self, texts: Sequence[str]) -> None:
        """Learn a vocabulary from training texts, where the tokenizer has none yet."""
        ...

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """Return the tokens of each text, special ones included, cut to `max_length`."""
        ...


class WordTokenizer:
    """Lower-case words and punctuation marks, the most frequent ones of the training texts. Needs no extra package.

    Token 0 fills short rows, 1 stands for unknown words, 2 begins a text.

    Args:
        vocab_size: Size of the vocabulary with the three special tokens; words beyond it are unknown.

    Example:
        >>> words = WordTokenizer(vocab_size=5)
        >>> words.fit(["good, good and bad", "good and"])
        >>> words.encode(["Good or bad?", "and"])
        [[2, 3, 1, 1, 1], [2, 4]]
    """

    pad_id, unknown_id, start_id = 0, 1, 2

    def __init__(self, *, vocab_size: int = 8192) -> None:
        if vocab_size < 4:
            raise ValueError(f"vocab_size must be at least 4, not {vocab_size}")
        self.vocab_size = vocab_size
        self._numbers: dict[str, int] = {}

    def fit(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in _words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        self._numbers = {word: number for number, word in enumerate(ranked[: self.vocab_size - 3], start=3)}

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        numbers, unknown = self._numbers, self.unknown_id
        return [[self.start_id, *(numbers.get(word, unknown) for word in _words(text))][:max_length] for text in texts]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]|_", text.lower())


class CharTokenizer:
    """One token a character; the last token stands for unknown characters.

    Args:
        characters: The vocabulary; None: learnt from the training texts, all that occur.

    Example:
        >>> CharTokenizer("abc").encode(["cab!"])
        [[2, 0, 1, 3]]
    """

    pad_id = 0

    def __init__(self, characters: str | None = None) -> None:
        if characters is not None and len(set(characters)) != len(characters):
            raise ValueError(f"characters must not repeat any, but {len(characters) - len(set(characters))} do")
        self._numbers = {character: number for number, character in enumerate(characters or "")}

    @property
    def vocab_size(self) -> int:
        if not self._numbers:
            raise ConfigError("a character vocabulary is known only after the data are read; call setup() first")
        return len(self._numbers) + 1

    def fit(self, texts: Sequence[str]) -> None:
        if not self._numbers:
            found = sorted(set().union(*texts)) if texts else []
            self._numbers = {character: number for number, character in enumerate(found)}

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        numbers, unknown = self._numbers, len(self._numbers)
        return [[numbers.get(character, unknown) for character in text[:max_length]] for text in texts]


class FileTokenizer:
    """A tokenizer of the `tokenizers` package, from a `tokenizer.json` file.

    Args:
        path: The file.
        pad_token: Name of the token that fills short rows.

    Raises:
        MissingExtraError: The package is not installed (on first use).
        StorageError: The file cannot be read (on first use).
    """

    def __init__(self, path: str | Path, *, pad_token: str = "[PAD]") -> None:
        self.path, self.pad_token = Path(path).expanduser(), pad_token
        self._loaded: Any = None

    def content(self) -> bytes:
        """Return the file."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read the tokenizer {self.path} ({error.strerror or error})") from error

    @property
    def _tokenizer(self) -> Any:
        if self._loaded is None:
            # Without a word of its own, the package warns in every worker process that is forked later.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            try:
                from tokenizers import Tokenizer as HuggingFaceTokenizer
            except ImportError as error:
                raise MissingExtraError("tokenizers", extra="text", needed_for=type(self).__name__) from error
            try:
                self._loaded = HuggingFaceTokenizer.from_str(self.content().decode("utf-8"))
            except LightningOptError:
                raise
            except Exception as error:  # the package raises a plain Exception for a file that it cannot read
                raise StorageError(f"{self.path} is no tokenizer.json that tokenizers can read ({error})") from error
            self._loaded.no_padding()
        return self._loaded

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def pad_id(self) -> int:
        number = self._tokenizer.token_to_id(self.pad_token)
        if number is None:
            raise ConfigError(f"pad_token={self.pad_token!r} is not in the vocabulary of {self.path}")
        return int(number)

    def fit(self, texts: Sequence[str]) -> None:
        """Do nothing: the vocabulary is in the file."""

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        tokenizer = self._tokenizer
        if max_length is None:
            tokenizer.no_truncation()
        else:
            tokenizer.enable_truncation(max_length)
        return [encoded.ids for encoded in tokenizer.encode_batch(list(texts))]


class MiniLMTokenizer(FileTokenizer):
    """The tokenizer of all-MiniLM-L6-v2 (30,522 lower-case word pieces), read from the package that carries the model.

    Args:
        cache_dir: Where the package is kept; None: the default cache.
    """

    vocab_size = 30522
    pad_id = 0

    def __init__(self, *, cache_dir: str | Path | None = None) -> None:
        super().__init__(MINILM_TOKENIZER.path)
        self.cache_dir = cache_dir

    def content(self) -> bytes:
        return fetch.read(MINILM_TOKENIZER, self.cache_dir)


def text_key(text: str) -> bytes:
    """Return a hash by which two texts count as the same: letters and digits only, case ignored."""
    return hashlib.blake2b(" ".join(re.findall(r"[^\W_]+", text.lower())).encode(), digest_size=16).digest()
