"""What is left free after the walk: groups of units that are cut together, their kinds and their names."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from lightning_opt.pruning.structure.axes import (
    Axis,
    Factor,
    Reason,
    freeze,
    leaves,
    resolve,
    size_of,
)
from lightning_opt.pruning.structure.units import entries_of_units, nested_pairs, repeats_in_a_product
from lightning_opt.pruning.structure.walk import Walk


@dataclass(frozen=True)
class Member:
    """One axis of one tensor that a group cuts.

    Attributes:
        tensor: Full name of the parameter or buffer.
        dim: The axis, from 0.
        indices: `(size, k)` int64: the entries of the axis that belong to each unit.
        is_parameter: False for buffers.
    """

    tensor: str
    dim: int
    indices: Tensor
    is_parameter: bool


@dataclass(frozen=True)
class Group:
    """Units that can be cut, each from all members at once.

    Attributes:
        name: Stable and readable, such as "layer1.0.conv1" or "encoder.layer.0.attention heads".
        size: Number of units.
        kind: "channels" (of convolutions), "inner" (places within each group of channels), "hidden" (between linear
            layers), "heads" (with grouped queries: a key with its queries), "queries" (per key), "head_dim", "width"
            (of a residual stream), "embedding" (of a table, before a projection).
        members: What is cut.
        exact: Cutting units is the same as zeroing them, since no norm or mean runs over them.
        inexact_because: Why it is not, with the operation; empty if it is.
        params_per_unit: Parameters that one unit has.
        flops_per_unit: Floating point operations for the example inputs that one unit costs (two for each
            multiply-accumulate of linear maps, convolutions and attention).
    """

    name: str
    size: int
    kind: str
    members: tuple[Member, ...]
    exact: bool
    inexact_because: str
    params_per_unit: int
    flops_per_unit: int
    factor: Factor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Refusal:
    """An axis that is not cut.

    Attributes:
        tensor: Full name of the parameter.
        dim: The axis, from 0.
        why: A sentence about the axis.
        operation: The operation that froze it and its module; empty for inputs and outputs of the model.
    """

    tensor: str
    dim: int
    why: str
    operation: str

    def __str__(self) -> str:
        where = f" ({self.operation})" if self.operation else ""
        return f"{self.tensor} dim {self.dim} {self.why}{where}"


def freeze_repeats(walk: Walk) -> None:
    """Freeze factors that come twice in one product, which have no units of their own."""
    for name, axes in walk.tensors.items():
        for dim, axis in enumerate(axes):
            for factor in repeats_in_a_product(axis):
                freeze([factor], Reason("is a product of an axis with itself", f"dim {dim} of {name}"))


def freeze_ignored(walk: Walk, ignore: Sequence[str]) -> None:
    """Freeze every axis of the tensors whose name, or whose module's name, matches a pattern.

    Raises:
        ValueError: A pattern matches nothing.
    """
    for pattern in ignore:
        found = [name for name in walk.tensors if _matches(name, pattern)]
        if not found:
            raise ValueError(f"ignore: {pattern!r} matches no parameter; there are {', '.join(list(walk.tensors)[:8])}")
        for name in found:
            for axis in walk.tensors[name]:
                freeze(axis, Reason(f"is ignored by {pattern!r}"))


def find_groups(walk: Walk, parameters: Mapping[str, Tensor]) -> list[Group]:
    """Return the groups of free factors, in the order of the model's parameters."""
    places: dict[Factor, list[tuple[str, int]]] = defaultdict(list)
    order = {
        name: place
        for place, name in enumerate([*parameters, *(name for name in walk.tensors if name not in parameters)])
    }
    for name in sorted(walk.tensors, key=order.__getitem__):
        for dim, axis in enumerate(walk.tensors[name]):
            for factor in dict.fromkeys(leaves(axis)):
                if factor.frozen is None:
                    places[factor].append((name, dim))
    found = [(factor, at) for factor, at in places.items() if _is_group(at, parameters)]
    kinds = _kinds(walk, dict(found))
    names = _names(found, kinds, walk.outputs)
    costs = _cost_per_unit(walk, [factor for factor, _ in found])
    entries = {
        (name, dim): entries_of_units(axis) for name, axes in walk.tensors.items() for dim, axis in enumerate(axes)
    }
    return [
        _group(factor, at, kinds[factor], names[factor], entries, parameters, costs[factor]) for factor, at in found
    ]


def find_refusals(walk: Walk, parameters: Mapping[str, Tensor]) -> list[Refusal]:
    """Return the axes of parameters of which nothing can be cut, or not all, with each reason."""
    found = []
    for name in parameters:
        for dim, axis in enumerate(walk.tensors.get(name, ())):
            reasons = [leaf.frozen for leaf in leaves(axis)]
            told = [r for r in dict.fromkeys(reasons) if r and (None not in reasons or not r.minor)]
            found += [Refusal(name, dim, reason.why, reason.operation) for reason in told]
    return found


def _is_group(places: list[tuple[str, int]], parameters: Mapping[str, Tensor]) -> bool:
    return len(places) > 1 and any(name in parameters for name, _ in places)


def _group(
    factor: Factor,
    places: list[tuple[str, int]],
    kind: str,
    name: str,
    entries: Mapping[tuple[str, int], Mapping[Factor, Tensor]],
    parameters: Mapping[str, Tensor],
    flops: int,
) -> Group:
    members = tuple(Member(tensor, dim, entries[tensor, dim][factor], tensor in parameters) for tensor, dim in places)
    params = sum(
        _entries_per_unit(members, tensor, parameters[tensor])
        for tensor in {m.tensor for m in members if m.is_parameter}
    )
    reason = factor.inexact
    because = f"{reason.why} ({reason.operation})" if reason else ""
    return Group(name, factor.size, kind, members, reason is None, because, params, flops, factor)


def _entries_per_unit(members: Sequence[Member], tensor: str, data: Tensor) -> int:
    """Count the entries of a tensor that one unit has, those at a crossing of two of its axes once."""
    left = 1
    for dim, size in enumerate(data.shape):
        cut = sum(member.indices.shape[1] for member in members if (member.tensor, member.dim) == (tensor, dim))
        left *= size - cut
    return data.numel() - left


def _cost_per_unit(walk: Walk, factors: Sequence[Factor]) -> dict[Factor, int]:
    """Return the floating point operations that one unit of each factor takes part in."""
    found: dict[Factor, float] = dict.fromkeys(factors, 0.0)
    for axes in walk.costs:
        sizes = [size_of(axis) for axis in axes]
        total = 2.0
        for size in sizes:
            total *= size
        for axis, size in zip(axes, sizes, strict=True):
            counts: dict[Factor, int] = defaultdict(int)
            _count(axis, 1, counts)
            for factor, count in counts.items():
                if factor in found:
                    found[factor] += total * count / size
    return {factor: round(value) for factor, value in found.items()}


def _count(axis: Axis, times: int, counts: dict[Factor, int]) -> None:
    """Add up how many entries of an axis one unit of each factor has."""
    factors = resolve(axis)
    for place, factor in enumerate(factors):
        others = times * size_of([*factors[:place], *factors[place + 1 :]])
        if factor.terms is None:
            counts[factor] += others
        else:
            for term in factor.terms:
                _count(term, others, counts)


def _kinds(walk: Walk, places: Mapping[Factor, list[tuple[str, int]]]) -> dict[Factor, str]:
    kinds = {factor: _kind(factor) for factor in places}
    nests = _nests(walk, places)
    for factor, nest in nests.items():
        if kinds[factor] == "heads" and any(
            kinds[other] == "heads" and len(places[other]) > len(places[factor]) for other in nest
        ):
            kinds[factor] = "queries"
    for factor in places:
        # Where no outer factor can be cut, the largest of those that are nested stands for the channels.
        inner = [other for other in (factor, *nests[factor]) if kinds[other] in ("channels", "inner")]
        if kinds[factor] == "inner" and all(kinds[other] == "inner" for other in inner):
            kinds[max(inner, key=lambda other: other.size)] = "channels"
    return kinds


def _nests(walk: Walk, places: Mapping[Factor, list[tuple[str, int]]]) -> dict[Factor, list[Factor]]:
    """Return for each factor those that it is in one product with anywhere."""
    found: dict[Factor, dict[Factor, None]] = {factor: {} for factor in places}
    for axes in walk.tensors.values():
        for axis in axes:
            for factor, other in nested_pairs(axis):
                if factor in places and other in places:
                    found[factor][other] = None
    return {factor: list(others) for factor, others in found.items()}


def _kind(factor: Factor) -> str:
    marks = factor.marks
    if "queries" in marks:
        return "queries"
    if "heads" in marks:
        return "heads"
    if "head_dim" in marks:
        return "head_dim"
    if "residual" in marks and ("spanned" in marks or "conv" not in marks):
        return "width"
    if "conv" in marks:
        return "inner" if "inner" in marks else "channels"
    return "hidden" if "linear" in marks else "embedding"


def _names(
    found: Sequence[tuple[Factor, list[tuple[str, int]]]], kinds: Mapping[Factor, str], outputs: set[tuple[str, int]]
) -> dict[Factor, str]:
    names: dict[Factor, str] = {}
    taken: set[str] = set()
    for factor, places in found:
        made = [place for place in places if place in outputs] or places
        base = _base_name([tensor for tensor, _ in places], made[0][0], kinds[factor])
        name, count = base, 2
        while name in taken:
            name, count = f"{base} {count}", count + 1
        taken.add(name)
        names[factor] = name
    return names


def _base_name(tensors: list[str], made: str, kind: str) -> str:
    """Name a group after the module that makes its units, or after what its modules have in common."""
    owners = [tensor.rpartition(".")[0] for tensor in tensors]
    maker = made.rpartition(".")[0]
    if kind in ("channels", "hidden"):
        return maker or made
    parts = [owner.split(".") for owner in owners]
    common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    place = ".".join(names[0] for names in common) if kind in ("heads", "queries", "width") else maker
    return f"{place} {kind}".strip()


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern names a tensor, its module or a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))
