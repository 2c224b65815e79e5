"""Axes of tensors as products and sums of factors, and the union-find that says which axes are one.

An axis of n entries is a row-major product of factors: that of a fused projection may be heads x head size. A factor is
plain; or a product, once a view has taken it apart; or a sum, once a concatenation or a split has. To unify two axes
is to say that the same entries must be kept in both. What is left at the end are plain factors: the units that can be
cut. Every step only ever ties entries together, so what remains free is free in the whole program.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias


@dataclass(frozen=True)
class Reason:
    """Why an axis cannot be cut, or why cutting it is not the same as zeroing it.

    Attributes:
        why: A short sentence without a subject, such as "is an axis of the model's outputs".
        operation: Where in the program: the operation and its module, such as "softmax in encoder.0".
        minor: Not worth telling of an axis that has other units which are free, such as the 3 of a fused projection.
    """

    why: str
    operation: str = ""
    minor: bool = False


class Factor:
    """A node of the union-find: `size` entries that are kept or cut together with all that is unified with it."""

    __slots__ = ("frozen", "inexact", "link", "marks", "product", "size", "terms")

    def __init__(self, size: int) -> None:
        self.size = size
        self.link: Factor | None = None
        self.product: list[Factor] | None = None
        self.terms: list[Axis] | None = None
        self.frozen: Reason | None = None
        self.inexact: Reason | None = None
        self.marks: frozenset[str] = frozenset()


Axis: TypeAlias = list[Factor]


def new_axis(size: int) -> Axis:
    """Return an axis of one fresh factor; an axis of one entry has none."""
    return [Factor(size)] if size != 1 else []


def sum_axis(terms: Sequence[Axis]) -> Axis:
    """Return the axis that lays `terms` one after the other; those of no entries are left out."""
    terms = [term for term in terms if size_of(term)] or [new_axis(0)]
    if len(terms) == 1:
        return terms[0]
    factor = Factor(sum(size_of(term) for term in terms))
    factor.terms = [list(term) for term in terms]
    return [factor]


def size_of(axis: Axis) -> int:
    """Return the number of entries of an axis."""
    return math.prod(factor.size for factor in axis)


def resolve(axis: Axis) -> Axis:
    """Return the axis as its current plain and sum factors, products taken apart."""
    found: Axis = []
    for factor in axis:
        root = _root(factor)
        if root.product is not None:
            found += resolve(root.product)
        elif root.size != 1:
            found.append(root)
    return found


def leaves(axis: Axis) -> Iterator[Factor]:
    """Yield the plain factors of an axis, in order, those of sums included; one may come more than once."""
    for factor in resolve(axis):
        if factor.terms is None:
            yield factor
        else:
            for term in factor.terms:
                yield from leaves(term)


def freeze(axis: Axis, reason: Reason) -> None:
    """Say that no entry of the axis may be cut; the first reason stays."""
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or reason


def mark(axis: Axis, *names: str) -> None:
    """Note what an axis is used for."""
    for leaf in leaves(axis):
        leaf.marks |= frozenset(names)


def mark_inexact(axis: Axis, reason: Reason) -> None:
    """Say that cutting entries of the axis changes the others, unlike zeroing them; the first reason stays."""
    for leaf in leaves(axis):
        leaf.inexact = leaf.inexact or reason


def unify(first: Axis, second: Axis, reason: Reason) -> None:
    """Say that both axes, of one size, keep the same entries; freeze both where that cannot be said in factors.

    Args:
        first: An axis.
        second: Another axis.
        reason: Where it happens, for the message when they do not line up.
    """
    a, b = resolve(first), resolve(second)
    while a and b:
        x, y = a[0], b[0]
        if x is y or (x.size == y.size and _merge(x, y)):
            a, b = resolve(a[1:]), resolve(b[1:])
            continue
        if x.size > y.size and (parts := factorize(x, y.size)):
            a = resolve([*parts[0], *parts[1], *a[1:]])
        elif y.size > x.size and (parts := factorize(y, x.size)):
            b = resolve([*parts[0], *parts[1], *b[1:]])
        else:
            _freeze_mismatch([*a, *b], reason)
            return
    if a or b:
        _freeze_mismatch([*a, *b], reason)


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis] | None:
    """Return `axes`, laid out in row-major order, as axes of the sizes `shape`; None where that cannot be said."""
    source = [factor for axis in axes for factor in resolve(axis)]
    found: list[Axis] = []
    for size in shape:
        taken, need = [], size
        while need > 1:
            source = resolve(source)
            if not source:
                return None
            head = source[0]
            if need % head.size == 0:
                taken.append(head)
                need //= head.size
                source = source[1:]
            elif head.size % need == 0 and (parts := factorize(head, need)):
                source = [*parts[0], *parts[1], *source[1:]]
            else:
                return None
        found.append(taken)
    return found if not resolve(source) else None


def factorize(factor: Factor, outer: int) -> tuple[Axis, Axis] | None:
    """Take a factor apart into `outer` times the rest; a sum by the distributive law a*r + b*r = (a + b)*r."""
    factor = _root(factor)
    if outer < 1 or factor.size % outer:
        return None
    inner = factor.size // outer
    if factor.terms is None:
        head, tail = new_axis(outer), new_axis(inner)
        _refine(factor, product=[*head, *tail])
        return head, tail
    heads, tails = [], []
    for term in factor.terms:
        if size_of(term) % inner or not (parts := regroup([term], [size_of(term) // inner, inner])):
            return None
        heads.append(parts[0])
        tails.append(parts[1])
    for tail in tails[1:]:
        unify(tails[0], tail, Reason("parts of a concatenation that are viewed as rows"))
    head = sum_axis(heads)
    factor.terms, factor.product = None, [*head, *tails[0]]
    return head, tails[0]


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
    """Cut an axis into consecutive parts of `sizes` entries; None where that cannot be said in factors."""
    if len(sizes) == 1:
        return [axis]
    if 0 in sizes:
        filled = split(axis, [size for size in sizes if size])
        rest = iter(filled or ())
        return filled and [next(rest) if size else new_axis(0) for size in sizes]
    factors = resolve(axis)
    if not factors:
        return None
    head, tail = factors[0], factors[1:]
    row = size_of(tail)
    if row > 1:
        if any(size % row for size in sizes):
            return None
        parts = split([head], [size // row for size in sizes])
        return parts and [[*part, *tail] for part in parts]
    if head.terms is not None:
        return _split_sum(head, sizes)
    terms = [new_axis(size) for size in sizes]
    _refine(head, terms=terms)
    return terms


def _root(factor: Factor) -> Factor:
    while factor.link is not None:
        if factor.link.link is not None:
            factor.link = factor.link.link
        factor = factor.link
    return factor


def _refine(factor: Factor, *, product: Axis | None = None, terms: list[Axis] | None = None) -> None:
    """Give a plain factor parts, which inherit what is known of it."""
    factor.product, factor.terms = product, terms
    _inherit([factor], factor)


def _inherit(axis: Axis, known: Factor) -> None:
    for leaf in leaves(axis):
        leaf.frozen = leaf.frozen or known.frozen
        leaf.inexact = leaf.inexact or known.inexact
        leaf.marks |= known.marks


def _merge(x: Factor, y: Factor) -> bool:
    """Make two different roots of one size one; False where two sums do not line up."""
    if x.terms is not None and y.terms is not None:
        cuts = sorted({*accumulate(map(size_of, x.terms)), *accumulate(map(size_of, y.terms))})
        sizes = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
        first, second = split([x], sizes), split([y], sizes)
        if first is None or second is None:
            return False
        for a, b in zip(first, second, strict=True):
            unify(a, b, Reason("two concatenations whose parts do not line up"))
        if _root(x) is not _root(y) and x.terms is not None:
            x.link = y
        return True
    if x.terms is not None:
        x, y = y, x
    x.link = y
    _inherit([y], x)
    return True


def _split_sum(factor: Factor, sizes: Sequence[int]) -> list[Axis] | None:
    """Cut a sum at new places, taking apart the terms that a cut goes through."""
    assert factor.terms is not None
    ends = list(accumulate(sizes))
    pieces: list[Axis] = []
    start = 0
    for term in factor.terms:
        end = start + size_of(term)
        cuts = [cut for cut in ends if start < cut < end]
        inner = [b - a for a, b in zip([start, *cuts], [*cuts, end], strict=True)]
        parts = split(term, inner)
        if parts is None:
            return None
        pieces += parts
        start = end
    factor.terms = pieces
    return _grouped(pieces, ends)


def _grouped(pieces: Sequence[Axis], ends: Sequence[int]) -> list[Axis]:
    """Join consecutive pieces up to each end."""
    found: list[Axis] = []
    waiting: list[Axis] = []
    place = 0
    for piece in pieces:
        waiting.append(piece)
        place += size_of(piece)
        if place == ends[len(found)]:
            found.append(sum_axis(waiting))
            waiting = []
    return found


def _freeze_mismatch(axis: Axis, reason: Reason) -> None:
    freeze(axis, Reason(f"meets an axis that is divided in another way ({reason.why})", reason.operation))
