"""From scores to masks where each process holds a part of each weight: the masks that one process would choose.

Where the border between two parts runs through a unit (an n:m group, a block, a row), the scores of that one tensor
are put together first, and every process then has all of them.
"""

from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_opt.pruning.allocation import Allocation, GlobalAllocation
from lightning_opt.pruning.criteria.base import Criterion, Evidence
from lightning_opt.pruning.parts import Layout, Place, sum_over_ranks
from lightning_opt.pruning.parts_ranking import Marked, Parts
from lightning_opt.pruning.patterns import Pattern
from lightning_opt.pruning.selection import check_shares, turn


def score_part(
    criterion: Criterion, name: str, part: Tensor | None, evidence: Evidence, layout: Layout
) -> Tensor | None:
    """Score this process's part of a weight; all processes must call it, also those that hold nothing of it.

    A criterion that looks at each element alone scores the part. Any other one is given the whole weight, put together
    for that moment, with its evidence.

    Args:
        criterion: The score.
        name: Of the weight.
        part: This process's part, and
        evidence: what is known about it: of the part where it has the weight's shape, else of the whole.
        layout: Who holds what.
    """
    if criterion.elementwise:
        return None if part is None else criterion.score(part, evidence)
    weight = layout.whole(name, part)
    known = evidence.with_weight_shaped(lambda value: layout.whole(name, value, dtype=torch.float32))
    whole = criterion.score(weight, known)
    return None if part is None else layout.part(name, whole)


def select_parts(
    scores: Mapping[str, Tensor | None],
    layout: Layout,
    *,
    pattern: Pattern,
    allocation: Allocation,
    sparsity: float,
    fraction: float = 1.0,
    inputs_first: Collection[str] = (),
) -> dict[str, Tensor]:
    """Choose which weights stay, as `selection.select` does with whole scores; all processes must call it.

    Args:
        scores: Name to the scores of this process's part, for all names of `layout` in its order; None: no part.
        layout: Who holds what.
        pattern: As in `select`, as are
        allocation: this,
        sparsity: this,
        fraction: this and
        inputs_first: this.

    Returns:
        Name to the bool mask of this process's part, for the parts that it has.

    Raises:
        ValueError: As `select` does.
    """
    check_shares(sparsity, fraction)
    turned = {name for name in layout if pattern.oriented and name in inputs_first and len(layout[name].shape) > 1}
    places = {name: layout[name].turned() if name in turned else layout[name] for name in layout}
    for name, place in places.items():
        pattern.check(name, place.shape)
    given = {
        name: _empty(places[name]) if score is None else turn(name, score.float(), pattern, inputs_first)
        for name, score in scores.items()
    }
    straddled = _straddled(pattern, places)
    units, held = {}, {}
    for name, place in places.items():
        whole = layout.whole(name, scores[name], dtype=torch.float32) if name in straddled else None
        if whole is not None:
            given[name] = turn(name, whole, pattern, inputs_first)
            shape = given[name].shape
            held[name] = Place(shape, (0,) * len(shape), shape, counts=dist.get_rank() == 0)
        else:
            held[name] = place
        units[name] = _pool(pattern, given[name], held[name])
    marks = _keep(units, {n: p.shape for n, p in places.items()}, pattern, allocation, sparsity, fraction)
    masks = {}
    for name, mask in marks.items():
        if scores[name] is None:
            continue
        spread = (
            pattern.expand(mask, held[name].sizes) if 0 not in held[name].sizes else mask.new_zeros(held[name].sizes)
        )
        back = turn(name, spread, pattern, inputs_first)
        masks[name] = layout.part(name, back) if name in straddled else back
    return masks


def _empty(place: Place) -> Tensor:
    return torch.empty(place.sizes)


def _straddled(pattern: Pattern, places: Mapping[str, Place]) -> set[str]:
    """Return the tensors of which some process holds a part that cuts through units."""
    cuts = torch.tensor([pattern.units_at(place) is None for place in places.values()], dtype=torch.int32)
    return {name for name, count in zip(places, sum_over_ranks(cuts).tolist(), strict=True) if count}


def _pool(pattern: Pattern, scores: Tensor, place: Place) -> Parts:
    if 0 in place.sizes:
        grid = pattern.units_at(place)
        assert grid is not None
        return Parts(scores.reshape(-1), grid)
    pooled = pattern.pool(scores).float()
    grid = pattern.units_at(place)
    if grid is None:  # a pattern that does not say: the part is the whole weight, and its order that of the pool
        grid = Place(torch.Size([len(pooled)]), (0,), pooled.shape, place.counts)
    return Parts(pooled, grid)


def _keep(
    units: Mapping[str, Parts],
    shapes: Mapping[str, torch.Size],
    pattern: Pattern,
    allocation: Allocation,
    sparsity: float,
    fraction: float,
) -> dict[str, Tensor]:
    """Return the mask of the units that are here."""
    if pattern.density is not None:
        _refuse_nan(units)
        return {n: pattern.keep(p.scores, fraction) if len(p.scores) else p.scores.bool() for n, p in units.items()}
    sizes = {shapes[name].numel() // len(parts) for name, parts in units.items()}
    if allocation.ranks_parts and not (isinstance(allocation, GlobalAllocation) and len(sizes) > 1):
        # what only ranks and counts takes parts as it takes tensors
        chosen = allocation.keep(units, shapes, sparsity=sparsity, fraction=fraction)  # type: ignore[arg-type]
        return {name: mark.mask for name, mark in chosen.items() if isinstance(mark, Marked)}
    together = {name: parts.whole() for name, parts in units.items()}
    masks = allocation.keep(together, shapes, sparsity=sparsity, fraction=fraction)
    return {name: _here(mask, units[name].place) for name, mask in masks.items()}


def _here(mask: Tensor, place: Place) -> Tensor:
    return mask.view(place.shape)[place.box].reshape(-1)


def _refuse_nan(units: Mapping[str, Parts]) -> None:
    bad = torch.stack([parts.scores.isnan().any() for parts in units.values()]).int()
    for name, count in zip(units, sum_over_ranks(bad).tolist(), strict=True):
        if count:
            raise ValueError(f"the scores of {name} hold NaN; weights or gradients of that tensor are not finite")
