"""Units of the plain factors of an axis, and the entries that belong to them."""

from collections.abc import Iterator, Mapping
from itertools import permutations

import torch
from torch import Tensor

from lightning_opt.pruning.structure.axes import Axis, Factor, leaves, resolve, size_of


def kept_mask(axis: Axis, kept: Mapping[Factor, Tensor]) -> Tensor:
    """Return which entries of an axis stay: `(size,)` bool.

    Args:
        axis: The axis.
        kept: For plain factors, which of their units stay; all units of the others do.
    """
    mask = torch.ones(1, dtype=torch.bool)
    for factor in resolve(axis):
        if factor.terms is not None:
            inside = torch.cat([kept_mask(term, kept) for term in factor.terms])
        else:
            inside = kept.get(factor, torch.ones(factor.size, dtype=torch.bool))
        mask = (mask[:, None] & inside[None]).flatten()
    return mask


def kept_count(axis: Axis, counts: Mapping[Factor, int]) -> int:
    """Return how many entries of an axis stay, given how many units of plain factors do."""
    found = 1
    for factor in resolve(axis):
        if factor.terms is not None:
            found *= sum(kept_count(term, counts) for term in factor.terms)
        else:
            found *= counts.get(factor, factor.size)
    return found


def entries_of_units(axis: Axis) -> dict[Factor, Tensor]:
    """Return for each plain factor of an axis the entries that belong to each unit: `(size, k)` int64, rising."""
    return {factor: entries.sort(dim=1).values for factor, entries in _entries(resolve(axis)).items()}


def nested_pairs(axis: Axis) -> Iterator[tuple[Factor, Factor]]:
    """Yield the pairs of different plain factors that are in one product: an entry belongs to a unit of each."""
    factors = resolve(axis)
    inside = [dict.fromkeys(leaves([factor])) for factor in factors]
    for first, second in permutations(inside, 2):
        yield from ((a, b) for a in first for b in second if a is not b)
    for factor in factors:
        for term in factor.terms or ():
            yield from nested_pairs(term)


def repeats_in_a_product(axis: Axis) -> set[Factor]:
    """Return the plain factors that come twice in one product, such as both axes of a flattened outer product."""
    found: set[Factor] = set()
    seen: set[Factor] = set()
    for factor in resolve(axis):
        inside = set(leaves([factor]))
        for term in factor.terms or ():
            found |= repeats_in_a_product(term)
        found |= seen & inside
        seen |= inside
    return found


def _entries(factors: Axis) -> dict[Factor, Tensor]:
    found: dict[Factor, Tensor] = {}
    before, after = 1, size_of(factors)
    for part in factors:
        after //= part.size
        outer = torch.arange(before)[:, None, None] * (part.size * after)
        for factor, inside in _entries_within(part).items():
            places = outer + (inside * after).reshape(1, -1, 1) + torch.arange(after)
            places = places.view(before, *inside.shape, after).movedim(1, 0).reshape(factor.size, -1)
            found[factor] = torch.cat([found[factor], places], dim=1) if factor in found else places
        before *= part.size
    return found


def _entries_within(part: Factor) -> dict[Factor, Tensor]:
    if part.terms is None:
        return {part: torch.arange(part.size)[:, None]}
    found: dict[Factor, Tensor] = {}
    start = 0
    for term in part.terms:
        for factor, inside in _entries(resolve(term)).items():
            moved = inside + start
            found[factor] = torch.cat([found[factor], moved], dim=1) if factor in found else moved
        start += size_of(term)
    return found
