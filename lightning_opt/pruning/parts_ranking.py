"""The best k of many scores of which each process holds some: the same ones that one process with all would choose.

The k-th largest is found digit by digit, from the highest: all processes count how many of their scores have each
value of the next digit, and the sum of the counts says which value the k-th has. Of scores that equal it the first ones
count as better, in the order of the tensors and of the elements in the whole tensor, wherever they lie; the last of
them is found in the same way, by the digits of its index. Nothing but counts is exchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_opt.pruning.parts import Place, sum_over_ranks, together, together_on
from lightning_opt.pruning.ranking import NotANumberError, ordered

_BITS = 8  # of a digit
_VALUES = 1 << _BITS


@dataclass(frozen=True, eq=False)
class Parts:
    """The scores of the units of one tensor, of which this process holds some.

    Attributes:
        scores: `(units here,)` float32.
        place: Which units they are, in the grid of all units of the tensor.
    """

    scores: Tensor
    place: Place

    def __len__(self) -> int:
        return self.place.shape.numel()

    def whole(self) -> Tensor:
        """Return all scores `(units,)`, on all processes."""
        return together(self.place, self.scores.view(self.place.sizes), dtype=torch.float32).view(-1)

    def logical(self, positions: Tensor) -> Tensor:
        """Return where positions among the scores here lie among all units of the tensor."""
        index, stride = torch.zeros_like(positions), 1
        sides = zip(self.place.sizes, self.place.offsets, self.place.shape, strict=True)
        for size, offset, extent in reversed(list(sides)):
            index += (positions % max(size, 1) + offset) * stride
            positions, stride = positions // max(size, 1), stride * extent
        return index


@dataclass(frozen=True, eq=False)
class Marked:
    """Which units of one tensor are kept.

    Attributes:
        mask: `(units here,)` bool.
        count: How many there are on all processes together.
    """

    mask: Tensor
    count: int


def are_parts(units: Mapping[str, object]) -> TypeGuard[Mapping[str, Parts]]:
    """Whether each process has a part of the scores only."""
    return any(isinstance(scores, Parts) for scores in units.values())


def best_parts(groups: Sequence[tuple[Sequence[Parts], int]]) -> list[list[Marked]]:
    """Mark the largest scores in each of several groups of tensors; all processes must call it with the same groups.

    Args:
        groups: The tensors that compete, and how many of their units are kept.

    Raises:
        ValueError: A count is out of range, or a score is NaN.
    """
    every = [parts for members, _ in groups for parts in members]
    of = [number for number, (members, _) in enumerate(groups) for _ in members]
    for members, count in groups:
        total = sum(len(parts) for parts in members)
        if not 0 <= count <= total:
            raise ValueError(f"count must be between 0 and {total}, not {count}")
    _refuse_nan(every)
    keys = [ordered((parts.scores.detach().float() + 0.0).view(torch.int32)) for parts in every]  # -0.0 is 0.0
    counted = [key if parts.place.counts else key[:0] for key, parts in zip(keys, every, strict=True)]
    values, wanted = _kth(counted, of, [max(count, 1) for _, count in groups], digits=4, signed=True)
    above = [key > values[group] for key, group in zip(keys, of, strict=True)]
    ties = [key == values[group] for key, group in zip(keys, of, strict=True)]
    if any(count == 0 for _, count in groups):
        for mask, tie, group in zip(above, ties, of, strict=True):
            if groups[group][1] == 0:
                mask.zero_()
                tie.zero_()
                wanted[group] = 0
    numbers = _counts([*above, *ties], [*every, *every])
    taken = _taken(numbers[len(every) :], of, wanted)
    _fill(above, ties, every, taken, numbers[len(every) :])
    marks = [Marked(mask, number + more) for mask, number, more in zip(above, numbers, taken, strict=False)]
    return [[mark for mark, group in zip(marks, of, strict=True) if group == number] for number in range(len(groups))]


def each_on_one_rank(units: Mapping[str, Parts], change: Callable[[Tensor], Tensor]) -> dict[str, Parts]:
    """Change the scores of each tensor where they are together: the tensors take turns with the processes.

    Args:
        units: Scores by name.
        change: From `(units,)` scores to as many others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    changed = {}
    for number, (name, parts) in enumerate(units.items()):
        local = parts.scores.view(parts.place.sizes)
        whole = together_on(number % world, parts.place, local, dtype=torch.float32)
        new = parts.scores.new_empty(0, dtype=torch.float32) if whole is None else change(whole.view(-1))
        shape = torch.Size([len(parts)])
        changed[name] = Parts(new, Place(shape, (0,), new.shape, counts=number % world == rank))
    return changed


def _kth(
    keys: Sequence[Tensor], groups: Sequence[int], wants: Sequence[int], *, digits: int, signed: bool
) -> tuple[list[int], list[int]]:
    """Return for each group its want-th largest key, and how many that equal it are among the best.

    Args:
        keys: Whole numbers of each tensor.
        groups: Which group each tensor is in.
        wants: For each group, from 1.
        digits: How many digits a key has.
        signed: Whether keys may be below zero.
    """
    left, found = torch.tensor(wants), torch.zeros(len(wants), dtype=torch.int64)
    live = list(keys)
    for place in reversed(range(digits)):
        flip = _VALUES // 2 if signed and place == digits - 1 else 0
        shown = [((key >> (_BITS * place)) & (_VALUES - 1)) ^ flip for key in live]
        counts = torch.zeros(len(wants), _VALUES, dtype=torch.int64, device=keys[0].device)
        for digit, group in zip(shown, groups, strict=True):
            counts[group] += torch.bincount(digit, minlength=_VALUES)
        from_top = sum_over_ranks(counts).cpu().flip(1).cumsum(1)
        over = (from_top < left[:, None]).sum(1)
        left -= torch.where(over > 0, from_top.gather(1, (over - 1).clamp(min=0)[:, None])[:, 0], 0)
        chosen = (_VALUES - 1 - over).tolist()
        found = found * _VALUES + torch.tensor(chosen) - flip
        live = [key[digit == chosen[group]] for key, digit, group in zip(live, shown, groups, strict=True)]
    return found.tolist(), left.tolist()


def _counts(masks: Sequence[Tensor], every: Sequence[Parts]) -> list[int]:
    """Count what is True in each mask, over all processes."""
    counted = [
        mask.count_nonzero() if parts.place.counts else mask.new_zeros((), dtype=torch.int64)
        for mask, parts in zip(masks, every, strict=True)
    ]
    numbers: list[int] = sum_over_ranks(torch.stack(counted)).tolist()
    return numbers


def _taken(ties: Sequence[int], of: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Return how many of each tensor's ties are kept: the first tensors of a group come first."""
    left = list(wanted)
    taken = []
    for number, group in zip(ties, of, strict=True):
        taken.append(min(number, left[group]))
        left[group] -= taken[-1]
    return taken


def _fill(
    masks: Sequence[Tensor], ties: Sequence[Tensor], every: Sequence[Parts], taken: Sequence[int], there: Sequence[int]
) -> None:
    """Mark the first `taken` ties of each tensor."""
    split = [number for number, count in enumerate(taken) if 0 < count < there[number]]
    for number, count in enumerate(taken):
        if count and number not in split:
            masks[number] |= ties[number]
    if not split:
        return
    places = [ties[number].nonzero().squeeze(1) for number in split]
    # the first index is the largest key
    keys = [len(every[n]) - 1 - every[n].logical(place) for n, place in zip(split, places, strict=True)]
    counted = [key if every[n].place.counts else key[:0] for n, key in zip(split, keys, strict=True)]
    digits = -(-max(len(every[number]) for number in split).bit_length() // _BITS)
    last, _ = _kth(counted, range(len(split)), [taken[number] for number in split], digits=digits, signed=False)
    for number, place, key, least in zip(split, places, keys, last, strict=True):
        masks[number][place[key >= least]] = True


def _refuse_nan(every: Sequence[Parts]) -> None:
    bad = _counts([parts.scores.isnan() for parts in every], every)
    place = next((place for place, count in enumerate(bad) if count), None)
    if place is not None:
        raise NotANumberError(place)
