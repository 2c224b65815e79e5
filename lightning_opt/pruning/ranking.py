"""The best k of many scores, exactly, without sorting them.

The bits of a float32, read as a whole number, are in the order of the floats. So the k-th largest is found by counting:
a histogram of the upper 16 bits, then one of the lower 16 bits inside the bin where the k-th lies. Counts add up over
tensors (and over shards) without rounding, so that all who see the same scores find the same threshold. Of equal scores
the first ones count as better, in the order of the tensors and of the elements in them.

For large inputs a sample says beforehand where the threshold lies: one pass sets aside the few scores near it and
counts those above, and only the few are searched. Where the sample is wrong, all are. The answer is the same.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements whose temporaries stay in a core's cache
_FEW = 1 << 16  # up to here, ordering a copy is faster than two histograms
_SAMPLED_FROM = 1 << 16
_SAMPLE = 1 << 18
_MARGIN = 5.0  # standard errors of a rank in the sample
_HALF = 1 << 15


class NotANumberError(ValueError):
    """A score is NaN.

    Args:
        place: The place of its tensor among all.
    """

    def __init__(self, place: int) -> None:
        super().__init__(f"scores of tensor {place} hold NaN")
        self.place = place


def best(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` largest of all scores together.

    Args:
        scores: One-dimensional tensors; read as float32.
        count: How many to mark, from 0 to the number of scores.

    Returns:
        Bool masks of the scores' shapes with exactly `count` True in all.

    Raises:
        ValueError: `count` is out of range, or a score is NaN (the message holds the tensor's place).

    >>> best([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 3)
    [tensor([True, True]), tensor([False,  True])]
    """
    flat = [score.detach().float().reshape(-1) for score in scores]
    total = sum(score.numel() for score in flat)
    if not 0 <= count <= total:
        raise ValueError(f"count must be between 0 and {total}, not {count}")
    _refuse_nan(flat)
    if count in (0, total):
        return [torch.full_like(score, count > 0, dtype=torch.bool) for score in flat]
    found = _best_near_sample(flat, count, total=total) if total >= _SAMPLED_FROM else None
    return found or _best_of_all(flat, count)


def kth_largest(scores: Sequence[Tensor], count: int) -> float:
    """Return the `count`-th largest of all scores together, `count` from 1."""
    if sum(score.numel() for score in scores) <= _FEW:
        return _kth_of_few(_together(scores), [count])[0]
    upper = _histogram(scores, shift=16, low=-_HALF, high=_HALF - 1)
    low = (_bin_of(upper, count) - 1 - _HALF) * (1 << 16)
    lower = _histogram(scores, shift=0, low=low, high=low + (1 << 16) - 1)
    key = low + _bin_of(lower, count) - 1
    return float(ordered(torch.tensor([key], dtype=torch.int32)).view(torch.float32))


def count_true(mask: Tensor) -> int:
    """Count what is True in a bool tensor."""
    return int(np.count_nonzero(mask.numpy())) if _on_cpu(mask) else int(mask.count_nonzero())


def falling_order(scores: Tensor) -> Tensor:
    """Return one-dimensional scores as float32, the largest first."""
    scores = scores.detach().float()
    if _on_cpu(scores):
        return torch.from_numpy(np.sort(scores.numpy())).flip(0)
    return scores.sort(descending=True).values


def _best_of_all(flat: Sequence[Tensor], count: int) -> list[Tensor]:
    """Compare all scores with the count-th largest, and fill up with the first of those that equal it."""
    threshold = kth_largest(flat, count)
    masks = [score > threshold for score in flat]
    missing = count - sum(count_true(mask) for mask in masks)
    for mask, score in zip(masks, flat, strict=True):
        ties = (score == threshold).nonzero().squeeze(1)[:missing]
        mask[ties] = True
        missing -= len(ties)
        if missing == 0:
            break
    return masks


def _best_near_sample(flat: Sequence[Tensor], count: int, *, total: int) -> list[Tensor] | None:
    """Do the same where only the scores that a sample puts near the threshold are searched; None if it is not there."""
    low, high = _stretch(flat, count, total=total)
    masks, near, places, above = [], [], [], 0
    for score in flat:
        mask = torch.empty_like(score, dtype=torch.bool)
        found = [torch.empty(0, dtype=torch.int64, device=score.device)]
        for start, chunk in _chunks(score):
            over = _above(chunk, low, out=mask[start : start + len(chunk)])
            beyond = _above(chunk, high, out=torch.empty_like(over))
            above += count_true(beyond)
            found.append(_true_places(beyond.bitwise_xor_(over)).add_(start))
        masks.append(mask)
        places.append(torch.cat(found))
        near.append(score[places[-1]])
    missing, candidates = count - above, sum(len(scores) for scores in near)
    if not 0 <= missing <= candidates:
        return None
    chosen = best(near, missing) if candidates < total else _best_of_all(near, missing)
    for mask, place, keep in zip(masks, places, chosen, strict=True):
        mask[place[~keep]] = False
    return masks


def _stretch(flat: Sequence[Tensor], count: int, *, total: int) -> tuple[float, float]:
    """Return two scores: the count-th largest is very likely above the first, and not above the second."""
    step = max(total // _SAMPLE, 32 if total < 32 * _SAMPLE else 1)
    sample = _together([score[min(step // 2, len(score) - 1) :: step] for score in flat if len(score)])
    size, share = len(sample), count / total
    margin = _MARGIN * (share * (1 - share) * size) ** 0.5 + len(flat) + 2
    first, last = int(share * size - margin), int(share * size + margin)
    high, low = _kth_of_few(sample, [max(first, 1), min(last, size)])
    return (low if last <= size else -np.inf), (high if first >= 1 else np.inf)


def _kth_of_few(scores: Tensor, counts: list[int]) -> list[float]:
    """Return the count-th largest for each of `counts` by ordering a copy."""
    places = [len(scores) - count for count in counts]
    if _on_cpu(scores):
        ordered = np.partition(scores.numpy(), places)
        return [float(ordered[place]) for place in places]
    return scores.sort().values[places].tolist()


def _together(scores: Sequence[Tensor]) -> Tensor:
    return torch.cat([score.to(scores[0].device) for score in scores])


def _on_cpu(tensor: Tensor) -> bool:
    """Say whether numpy sees the tensor's memory; it compares and counts more than twice as fast as torch there."""
    return tensor.device.type == "cpu"


def _above(scores: Tensor, threshold: float, *, out: Tensor) -> Tensor:
    if not _on_cpu(scores):
        return torch.gt(scores, threshold, out=out)
    np.greater(scores.numpy(), np.float32(threshold), out=out.numpy())
    return out


def _true_places(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if _on_cpu(mask) else mask.nonzero().squeeze(1)


def _bin_of(histogram: Tensor, count: int) -> int:
    """Return the bin that holds the count-th largest."""
    at_least = histogram.flip(0).cumsum(0)
    return len(histogram) - 1 - int(torch.searchsorted(at_least, count))


def _histogram(flat: Sequence[Tensor], *, shift: int, low: int, high: int) -> Tensor:
    """Count the keys, without their last `shift` bits, from `low` to `high`; the outer two bins hold the rest."""
    counts = torch.zeros(high - low + 3, dtype=torch.int64, device=flat[0].device)
    for score in flat:
        for _, chunk in _chunks(score, larger=4):
            keys = ordered(chunk.view(torch.int32)) >> shift
            bins = keys.clamp_(low - 1, high + 1).sub_(low - 1)
            counts += torch.bincount(bins, minlength=len(counts)).to(counts.device)
    return counts


def _chunks(score: Tensor, *, larger: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Yield parts that fit a core's cache with their first place; a device other than the CPU takes all at once."""
    size = _CHUNK * larger if _on_cpu(score) else max(len(score), 1)
    return ((start, score[start : start + size]) for start in range(0, len(score), size))


def ordered(bits: Tensor) -> Tensor:
    """Turn the bits of float32 into whole numbers of the same order, and such numbers back into bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _refuse_nan(flat: Sequence[Tensor]) -> None:
    peaks = torch.stack([score.amax().cpu() for score in flat if len(score)] or [torch.zeros(())])
    if bool(peaks.isnan().any()):
        place = next(place for place, score in enumerate(flat) if bool(score.isnan().any()))
        raise NotANumberError(place)
