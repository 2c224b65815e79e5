"""Remove whole channels, heads and hidden units: choose which, and cut them out of the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_opt.forward import Inputs
from lightning_opt.pruning.criteria import Criterion, GroupCriterion, Magnitude, Random, score_groups
from lightning_opt.pruning.statistics import Statistics
from lightning_opt.pruning.structure import Group, Structure, trace
from lightning_opt.pruning.widths import KINDS, GlobalSizes, Sizes, Structures, UniformSizes, best_units
from lightning_opt.surgery import Recipe, apply_with_optimizers

Importance: TypeAlias = (
    Literal["l1", "l2", "random"] | Criterion | GroupCriterion | Mapping[str, Tensor | Sequence[float]]
)
Of: TypeAlias = Literal["units", "params", "flops"]
Kept: TypeAlias = dict[str, list[int]]
Count: TypeAlias = Callable[[Mapping[str, Sequence[int]] | None], int]

__all__ = [
    "GlobalSizes",
    "Importance",
    "Of",
    "Sizes",
    "Structures",
    "UniformSizes",
    "choose",
    "score",
    "shrink",
]


def choose(
    structure: Structure,
    scores: Mapping[str, Tensor],
    *,
    ratio: float = 0.5,
    of: Of = "units",
    pattern: Structures | None = None,
    round_to: int = 1,
    min_keep: int | None = None,
    allocation: Literal["uniform", "global"] | Sizes = "uniform",
) -> dict[str, list[int]]:
    """Choose which units stay, in every scored group.

    Args:
        structure: What was traced.
        scores: `(size,)` by group name, larger = keep; groups without scores stay whole.
        ratio: The share that goes: at least 0 and less than 1.
        of: What the share is of: each group's units, the model's parameters, or its floating point operations; for the
            last two as many units go, by the allocation's shares, as are needed to reach it.
        pattern: Widths and least numbers to respect, in place of `round_to` and `min_keep`.
        round_to: See `Structures`.
        min_keep: See `Structures`.
        allocation: "uniform": the same share everywhere. "global": all units compete. Or a `Sizes`, such as
            `LatencyAware`, for which the ratio is what it says.

    Returns:
        `{group name: rising units that stay}`, only of groups that lose some.

    Raises:
        ValueError: The ratio is out of range or cannot be reached, a group would be emptied, or the scores do not fit.
    """
    check_ratio(ratio)
    pattern = pattern or Structures(round_to=round_to, min_keep=min_keep)
    _check_scores(structure, scores)
    groups = [group for group in structure.groups if group.name in scores]
    how = _allocation(allocation)

    def kept(share: float, within: Structures) -> Kept:
        sizes = how.sizes(structure, groups, scores, ratio=share, pattern=within)
        return {g.name: best_units(scores[g.name], sizes[g.name]) for g in groups if sizes[g.name] < g.size}

    if of == "units":
        return kept(ratio, pattern)
    if of not in ("params", "flops") or not isinstance(how, UniformSizes | GlobalSizes):
        raise ValueError(f"of={of!r}: give 'units', or 'params' or 'flops' with uniform or global shares")
    count = structure.parameters if of == "params" else structure.flops
    clamped = Structures(pattern.kinds, pattern.round_to, pattern.min_keep or 1, pattern.exact)
    return _reach(ratio, of, count, lambda share: kept(share, clamped), most=how.most(groups, clamped))


def shrink(
    model: nn.Module,
    example_inputs: Inputs,
    ratio: float = 0.5,
    importance: Importance = "l2",
    round_to: int = 1,
    ignore: Sequence[str] = (),
    *,
    kinds: Sequence[str] | None = None,
    allocation: Literal["uniform", "global"] | Sizes = "uniform",
    of: Of = "units",
    min_keep: int | None = None,
    statistics: Statistics | None = None,
    optimizers: Iterable[Optimizer] | Optimizer = (),
    seed: int = 0,
) -> Recipe:
    """Remove a share of a model's channels, heads and hidden units, in place.

    Args:
        model: Any module that `torch.export` can trace. Its parameters stay the same objects.
        example_inputs: What `forward` takes.
        ratio: The share that goes: at least 0 and less than 1.
        importance: Which units stay: those with the largest "l1" or "l2" norm over all that would go with them, or
            "random" ones; a criterion; or `{group name: scores}`.
        round_to: Widths stay multiples of it, or as they are. 16 suits convolutions on CPUs; heads are not counted.
        ignore: Names or patterns of modules and parameters whose axes stay.
        kinds: See `Structures`; when not given, channels, heads and hidden units where masked equals removed.
        allocation: How the share is spread, and
        of: what it is of, see `choose`.
        min_keep: Units that each group keeps in any case; when not given a ratio that empties a group is refused.
        statistics: What a criterion that needs data has observed.
        optimizers: Those that train the model: their states are cut as well.
        seed: For "random".

    Returns:
        What was done, for `replay` on a fresh model; the model carries it too (`recipe_of`). Empty if nothing was cut.

    Raises:
        ValueError: `ratio` is out of range or would empty a group, nothing can go, or `ignore` names nothing.
        ConfigError: The model cannot be traced, or an optimizer's state cannot be cut; nothing has been changed.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> recipe = shrink(net, torch.ones(1, 8), ratio=0.75)
        >>> net[0], net[2]
        (Linear(in_features=8, out_features=4, bias=True), Linear(in_features=4, out_features=4, bias=True))
    """
    check_ratio(ratio)
    pattern = Structures(KINDS if kinds is None else kinds, round_to, min_keep, exact=kinds is None)
    check_ignored(model, ignore)
    structure = trace(model, example_inputs, ignore=ignore)
    scores = score(structure, pattern.of(structure), model, importance, statistics, seed=seed)
    how = _allocation(allocation).for_model(model, example_inputs)
    kept = choose(structure, scores, ratio=ratio, of=of, pattern=pattern, allocation=how)
    if not kept:
        return Recipe()
    edit = structure.edit(kept)
    apply_with_optimizers(model, edit, optimizers)
    return Recipe([edit])


def score(
    structure: Structure,
    groups: Sequence[Group],
    model: nn.Module,
    importance: Importance = "l2",
    statistics: Statistics | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score the units of some groups of a traced model, see `shrink`.

    Raises:
        ValueError: The importance is not known or does not fit the groups.
    """
    if isinstance(importance, Mapping):
        given = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in importance.items()}
        _check_scores(structure, given)
        if missing := [group.name for group in groups if group.name not in given]:
            raise ValueError(f"importance: there are no scores for {', '.join(missing)}")
        return {group.name: given[group.name] for group in groups}
    named: dict[str, Criterion] = {"l1": Magnitude(p=1), "l2": Magnitude(p=2), "random": Random()}
    criterion = named.get(importance) if isinstance(importance, str) else importance
    if not isinstance(criterion, Criterion | GroupCriterion):
        raise ValueError(f"importance must be 'l1', 'l2', 'random', a criterion or scores by group, not {importance!r}")
    return score_groups(replace(structure, groups=tuple(groups)), model, criterion, statistics, seed=seed)


def check_ratio(ratio: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: It is not at least 0 and less than 1.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio={ratio!r}: give the share that goes, at least 0 and less than 1")


def check_ignored(model: nn.Module, ignore: Sequence[str]) -> None:
    """Refuse patterns that name nothing in the model.

    Raises:
        ValueError: A pattern matches no module and no parameter; near names are listed.
    """
    if isinstance(ignore, str):
        raise ValueError(f"ignore={ignore!r}: give a list of patterns")
    names = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=5, cutoff=0.0)
            raise ValueError(f"ignore: {pattern!r} names no module or parameter; near names: {', '.join(near)}")


def _reach(ratio: float, of: str, count: Count, kept: Callable[[float], Kept], *, most: float) -> Kept:
    """Return the smallest cut that removes `ratio` of what is counted."""
    whole = count(None)
    low, high = 0.0, most
    best = kept(high)
    reached = 1.0 - count(best) / whole
    if reached < ratio:
        raise ValueError(f"ratio={ratio:g} of the {of} cannot be reached; what may be cut holds {reached:.3f} of them")
    for _ in range(20):
        middle = (low + high) / 2
        trial = kept(middle)
        if 1.0 - count(trial) / whole >= ratio:
            high, best = middle, trial
        else:
            low = middle
    return best


def _allocation(allocation: str | Sizes) -> Sizes:
    if isinstance(allocation, Sizes):
        return allocation
    if allocation not in ("uniform", "global"):
        raise ValueError(f"allocation must be 'uniform', 'global' or a Sizes such as LatencyAware, not {allocation!r}")
    return UniformSizes() if allocation == "uniform" else GlobalSizes()


def _check_scores(structure: Structure, scores: Mapping[str, Tensor]) -> None:
    sizes = {group.name: group.size for group in structure.groups}
    for name, values in scores.items():
        if name not in sizes:
            near = get_close_matches(name, list(sizes), n=5, cutoff=0.0)
            raise ValueError(f"scores: {name!r} names no group; near names: {', '.join(near) or 'there are none'}")
        if tuple(values.shape) != (sizes[name],):
            raise ValueError(f"scores: {name!r} has {sizes[name]} units and scores of shape {tuple(values.shape)}")
