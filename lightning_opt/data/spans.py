"""Random change of token rows: short spans of a text, for a teacher to judge piece by piece."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_opt.data.randomness import Draws


class RowTransform(Protocol):
    """What a data set applies to rows of tokens."""

    def __call__(self, ids: Tensor, lengths: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return changed rows `(B, T)` and their lengths `(B,)`; what lies beyond a length is padded afterwards.

        Row i may depend on row i and on its draws only.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class RandomSpan:
    """Show, of a share of the texts, only a span of random place and length.

    A label is of a whole text, so a student learns from spans only what a teacher says about each: with a teacher this
    asks it about many more texts than the data set has.

    Args:
        share: Of the samples that are cut.
        shortest: Fewest tokens of a span; a shorter text stays whole.
        longest: Most tokens of a span.
        keep_first: Special tokens that begin a text, such as [CLS], and stay.
        keep_last: Special tokens that end a text, such as [SEP], and stay.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    share: float = 0.5
    shortest: int = 2
    longest: int = 12
    keep_first: int = 1
    keep_last: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(f"shortest={self.shortest} and longest={self.longest}: give 1 <= shortest <= longest")
        if min(self.keep_first, self.keep_last) < 0:
            raise ValueError(f"keep_first={self.keep_first}, keep_last={self.keep_last}: give 0 or more")

    def __call__(self, ids: Tensor, lengths: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Cut rows `(B, T)` of `lengths` `(B,)`."""
        inner = (lengths - self.keep_first - self.keep_last).clamp_min(0)
        chosen, size, place = (draws.fork(number).uniform()[:, 0] for number in range(3))
        span = (self.shortest + size * (self.longest - self.shortest + 1)).long().minimum(inner)
        span = torch.where((chosen < self.share) & (inner >= self.shortest), span, inner)
        start = (place * (inner - span + 1)).long()
        steps = torch.arange(ids.shape[1])
        within = steps - self.keep_first  # position in the text proper, where that is what it shows
        source = torch.where((within >= 0) & (within < span[:, None]), steps + start[:, None], steps)
        after = within >= span[:, None]  # the tokens that end the text follow the span
        source = torch.where(after, steps + (inner - span)[:, None], source).clamp_max(ids.shape[1] - 1)
        return ids.gather(1, source), lengths - inner + span
