"""From scores to masks: which weights stay."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lightning_opt.pruning.allocation import Allocation, GlobalAllocation
from lightning_opt.pruning.patterns import Element, Pattern

_GLOBAL = GlobalAllocation()
_ELEMENT = Element()


def select(
    scores: Mapping[str, Tensor],
    *,
    pattern: Pattern = _ELEMENT,
    allocation: Allocation = _GLOBAL,
    sparsity: float = 0.9,
    fraction: float = 1.0,
    within: Mapping[str, Tensor] | None = None,
    protect: Mapping[str, Tensor] | None = None,
    inputs_first: Collection[str] = (),
) -> dict[str, Tensor]:
    """Choose which weights stay, anew from all of them.

    The answer depends on nothing but the arguments: sparsity is of the weights that are named, however many of them are
    zero already, so that repeated calls never compound. Counts are exact, and of equal scores the first stays, by the
    order of `scores` and of the elements in a tensor: all ranks that see the same scores get the same masks.

    A weight that was removed and set to zero has score 0 under magnitude (and under gradient times weight), so that on
    the way of a gradual schedule it stays out. Criteria that score it otherwise (movement) may bring it back; `within`
    forbids that.

    Args:
        scores: Full name to score of each weight, of the weight's shape; larger stays.
        pattern: The units in which weights stay or go.
        allocation: How the tensors share the sparsity; of no use to a pattern that fixes its density (N:M).
        sparsity: Share of the weights that shall be zero in the end, in [0, 1); likewise unused by N:M.
        fraction: How much of the way there is gone, in [0, 1]: a schedule's value.
        within: Bool masks; what is False there stays out. With the masks so far, masks only shrink.
        protect: Bool masks; what is True there stays in, and counts as kept.
        inputs_first: Names of weights `(inputs, outputs, ...)`, as `patterns.inputs_first` finds them.

    Returns:
        Full name to bool mask of the weight's shape, True where the weight stays.

    Raises:
        ValueError: A number is out of range, a weight does not fit the pattern, or a score is NaN.

    >>> select({"w": torch.tensor([[1.0, -2.0, 0.5, 4.0]])}, sparsity=0.5)
    {'w': tensor([[ True, False, False,  True]])}
    """
    check_shares(sparsity, fraction)
    turned = {name: turn(name, score, pattern, inputs_first) for name, score in scores.items()}
    shapes = {name: score.shape for name, score in turned.items()}
    for name, shape in shapes.items():
        pattern.check(name, shape)
    units = {name: pattern.pool(score.float()) for name, score in turned.items()}
    allowed = {name: _units_of(name, mask, pattern, inputs_first, every=True) for name, mask in (within or {}).items()}
    needed = {name: _units_of(name, mask, pattern, inputs_first) for name, mask in (protect or {}).items()}
    for name, kept in needed.items():
        units[name] = units[name].masked_fill(kept, torch.inf)
    for name, kept in allowed.items():
        units[name] = units[name].masked_fill(~kept, -torch.inf)
    masks = _keep(units, shapes, pattern, allocation, sparsity=sparsity, fraction=fraction)
    for name, kept in needed.items():
        masks[name] = masks[name] | kept
    for name, kept in allowed.items():
        masks[name] = masks[name] & kept
    return {name: turn(name, pattern.expand(masks[name], shapes[name]), pattern, inputs_first) for name in scores}


def check_shares(sparsity: float, fraction: float) -> None:
    """Refuse a sparsity outside [0, 1) and a fraction outside [0, 1].

    Raises:
        ValueError: Naming the argument and the value.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), such as 0.9 for nine of ten weights; got {sparsity}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], a schedule's value; got {fraction}")


def _keep(
    units: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    pattern: Pattern,
    allocation: Allocation,
    *,
    sparsity: float,
    fraction: float,
) -> dict[str, Tensor]:
    if pattern.density is None:
        return allocation.keep(units, shapes, sparsity=sparsity, fraction=fraction)
    for name, scores in units.items():
        if bool(scores.isnan().any()):
            raise ValueError(f"the scores of {name} hold NaN; weights or gradients of that tensor are not finite")
    return {name: pattern.keep(scores, fraction) for name, scores in units.items()}


def turn(name: str, value: Tensor, pattern: Pattern, inputs_first: Collection[str]) -> Tensor:
    """Bring a weight to `(outputs, inputs, ...)`, and back."""
    turns = pattern.oriented and name in inputs_first and value.dim() > 1
    return value.transpose(0, 1).contiguous() if turns else value


def _units_of(
    name: str, mask: Tensor, pattern: Pattern, inputs_first: Collection[str], *, every: bool = False
) -> Tensor:
    """Say of each unit whether one of its weights is marked, or with `every` all of them."""
    turned = turn(name, mask, pattern, inputs_first)
    marked = pattern.pool(turned.float())
    return marked == pattern.unit_size(turned.shape) if every else marked > 0
