"""Rules for products of matrices and for attention."""

from collections import defaultdict
from collections.abc import Sequence

from lightning_opt.pruning.structure.axes import (
    Axis,
    freeze,
    leaves,
    mark,
    mark_inexact,
    new_axis,
    resolve,
    size_of,
)
from lightning_opt.pruning.structure.calls import Answer, Call, Value, operation
from lightning_opt.pruning.structure.layers import lead_dirty, link_sizes
from lightning_opt.pruning.structure.pointwise import broadcast, dirty_of_product, dirty_of_sum


def contract(call: Call, first: Value, a: Axis, second: Value, b: Axis) -> None:
    """Tie two axes that are multiplied and summed over; exact while one of the two is zero at cut units."""
    call.unify(a, b)
    for leaf in set(leaves(a)) & first.dirty_leaves() & second.dirty_leaves():
        mark_inexact([leaf], call.reason("is summed over where it is not zero"))


@operation("addmm")
def _addmm(call: Call) -> Answer:
    bias, value, weight = call["self"], call["mat1"], call["mat2"]
    contract(call, value, value.axes[1], weight, weight.axes[0])
    call.unify(weight.axes[1], bias.axes[-1])
    link_sizes(call, "mat2", weight.axes[0], weight.axes[1], dim=1)
    mark(weight.axes[1], "linear")
    call.cost(value.axes[0], *weight.axes)
    return Value([value.axes[0], weight.axes[1]], dirty=lead_dirty(value.axes[:1], value, bias=True))


@operation("matmul", "mm", "bmm", "mv", "dot")
def _matmul(call: Call) -> Answer:
    first, second = call["self"], call["other"] or call["mat2"] or call["vec"] or call["tensor"]
    return multiply(call, first, second)


@operation("outer", "ger")
def _outer(call: Call) -> Answer:
    first, second = call["self"], call["vec2"]
    axes = [*first.axes, *second.axes]
    return Value(axes, dirty=dirty_of_product(axes, [first, second]))


@operation("baddbmm")
def _baddbmm(call: Call) -> Answer:
    product = multiply(call, call["batch1"], call["batch2"])
    axes = broadcast(call, [product, call["self"]], call.shape)
    return Value(axes, dirty=dirty_of_sum(axes, [product, call["self"]]))


def multiply(call: Call, first: Value, second: Value) -> Value:
    """Multiply `(..., m, k)` and `(..., k, n)`; a vector has no m or n."""
    left = first.axes[-2:-1] if len(first.axes) > 1 else []
    right = second.axes[-1:] if len(second.axes) > 1 else []
    inner = second.axes[-2 if right else -1]
    contract(call, first, first.axes[-1], second, inner)
    batches = [Value(first.axes[:-2], dirty=first.dirty), Value(second.axes[:-2], dirty=second.dirty)]
    lead_shape = call.shape[: len(call.shape) - len(left) - len(right)]
    lead = broadcast(call, batches, lead_shape)
    _mark_product(call, first, second, lead, inner, [*left, *right])
    call.cost(*lead, *left, inner, *right)
    axes = [*lead, *left, *right]
    return Value(axes, dirty=dirty_of_product(axes, [first, second]))


def _mark_product(call: Call, first: Value, second: Value, lead: list[Axis], inner: Axis, outer: list[Axis]) -> None:
    """Mark axes of attention: between two activations the batch axes are heads, the rest sizes of a head."""
    if first.dynamic and second.dynamic:
        for axis in lead[1:] if len(lead) > 1 else lead:
            mark_heads(call, axis)
        call.link(inner, "scale")
        if lead and outer:
            call.link([*lead[-1], *outer[-1]], "all_heads")
        for axis in (inner, *outer):
            mark_head_dim(call, axis)
        return
    for value, other, place in ((second, first, -1), (first, second, -2)):
        if not value.dynamic and other.dynamic and len(value.axes) == 2:
            mark(value.axes[place], "linear")


def mark_heads(call: Call, axis: Axis) -> None:
    """Mark heads, and note numbers of the module that count them."""
    mark(axis, "heads")
    call.link(axis, "heads")
    factors = resolve(axis)
    if len(factors) == 2:  # keys, and the queries of each
        call.link(factors[:1], "heads")
        call.link(factors[1:], "queries")


def mark_head_dim(call: Call, axis: Axis) -> None:
    """Mark what is inside a head."""
    mark(axis, "head_dim")
    call.link(axis, "head_dim")


@operation("scaled_dot_product_attention")
def _attention(call: Call) -> Answer:
    """Attend; heads are the third axis from the end, and with `enable_gqa` several queries share a key."""
    query, key, value = call["query"], call["key"], call["value"]
    contract(call, query, query.axes[-1], key, key.axes[-1])
    if call["scale"] is None:
        mark_inexact(query.axes[-1], call.reason("sets the scale of attention by its size"))
    call.unify(key.axes[-2], value.axes[-2])
    heads = _query_heads(call, query, key, value)
    call.link(query.axes[-1], "scale")
    mark_head_dim(call, query.axes[-1])
    mark_head_dim(call, value.axes[-1])
    call.cost(*query.axes, key.axes[-2])
    call.cost(*query.axes[:-1], value.axes[-2], value.axes[-1])
    mask = call["attn_mask"]
    scores = [*query.axes[:-1], key.axes[-2]]
    if mask is not None:
        broadcast(call, [Value(scores), mask], [size_of(axis) for axis in scores])
    freeze(key.axes[-2], call.reason("is compared along"))
    call.link([*heads, *value.axes[-1]], "all_heads")
    axes = (
        [*query.axes[:-3], heads, query.axes[-2], value.axes[-1]]
        if len(query.axes) > 2
        else [query.axes[-2], value.axes[-1]]
    )
    return Value(axes, dirty=dirty_of_product(axes, [value]))


def _query_heads(call: Call, query: Value, key: Value, value: Value) -> Axis:
    if len(query.axes) < 3:
        return []
    for a, b, c in zip(query.axes[:-3], key.axes[:-3], value.axes[:-3], strict=True):
        call.unify(a, b)
        call.unify(b, c)
    heads, shared = query.axes[-3], key.axes[-3]
    call.unify(shared, value.axes[-3])
    times = size_of(heads) // max(size_of(shared), 1)
    if times == 1 or (size_of(shared) == 1 and not call["enable_gqa"]):
        if times == 1:
            call.unify(heads, shared)
        mark_heads(call, heads)
        return heads
    queries = new_axis(times)
    call.unify(heads, [*shared, *queries])
    mark(queries, "queries")
    call.link(queries, "queries")
    mark_heads(call, shared)
    call.link(heads, "heads")
    return heads


@operation("einsum")
def _einsum(call: Call) -> Answer:
    """Contract by an equation; letters are axes."""
    values: Sequence[Value] = call["tensors"]
    terms = _letters(call["equation"], [len(value.axes) for value in values], len(call.shape))
    if terms is None:
        return call.refuse("is contracted along a diagonal or in a form that is not read")
    *operands, result = terms
    axes: dict[str, Axis] = {}
    holders: dict[str, list[Value]] = defaultdict(list)
    for letters, value in zip(operands, values, strict=True):
        for letter, axis in zip(letters, value.axes, strict=True):
            if size_of(axis) == 1 and letter in axes:
                continue
            call.unify(axes.setdefault(letter, axis) or axis, axis)
            axes[letter] = axes[letter] or axis
            holders[letter].append(value)
    for letter in set(axes) - set(result):
        for leaf in set(leaves(axes[letter])):
            if all(leaf in value.dirty_leaves() for value in holders[letter]):
                mark_inexact([leaf], call.reason("is summed over where it is not zero"))
    _mark_einsum(call, values, operands, result, axes)
    call.cost(*axes.values())
    found = [axes[letter] for letter in result]
    return Value(found, dirty=dirty_of_product(found, values))


def _mark_einsum(call: Call, values: Sequence[Value], operands: list[str], result: str, axes: dict[str, Axis]) -> None:
    if len(values) == 2 and all(value.dynamic for value in values):
        shared = [letter for letter in operands[0] if letter in operands[1] and letter in result]
        for letter in shared[1:] if len(shared) > 1 else shared:
            mark_heads(call, axes[letter])
        for letter in axes:
            if letter not in shared:
                call.link(axes[letter], *(["scale"] if letter not in result else []))
                mark_head_dim(call, axes[letter])
        return
    for value, letters in zip(values, operands, strict=True):
        for letter in letters if not value.dynamic else "":
            if letter in result:
                mark(axes[letter], "linear")


def _letters(equation: str, ranks: list[int], rank: int) -> list[str] | None:
    """Return the letters of each operand and of the result; dots become letters from the end of the alphabet."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        counts = [letter for letter in left if letter.isalpha()]
        dots = "..." if "..." in left else ""
        right = dots + "".join(sorted(letter for letter in set(counts) if counts.count(letter) == 1))
    spare = [letter for letter in "ZYXWVUTSRQPO" if letter not in equation]
    full = []
    for term, size in zip([*terms, right], [*ranks, rank], strict=True):
        count = size - len(term.replace("...", ""))
        letters = term.replace("...", "".join(reversed(spare[:count])) if "..." in term else "")
        if len(letters) != size or len(set(letters)) != len(letters):
            return None
        full.append(letters)
    return full
