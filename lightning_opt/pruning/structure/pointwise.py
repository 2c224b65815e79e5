"""Rules for operations that work entry by entry, for reductions, and for constants."""

from collections.abc import Sequence
from typing import Any

from lightning_opt.pruning.structure.axes import Axis, Factor, freeze, leaves, mark, mark_inexact, new_axis, size_of
from lightning_opt.pruning.structure.calls import Answer, Call, Value, operation

# Operations on one tensor that give zero for zero.
_KEEP_ZERO = """
relu relu6 leaky_relu rrelu prelu elu selu celu gelu silu mish tanh hardtanh hardswish hardshrink softshrink softsign
neg positive abs sign square sqrt sin sinh tan asin asinh atan atanh erf expm1 log1p trunc round floor ceil nan_to_num
dropout feature_dropout alpha_dropout clone contiguous alias detach lift_fresh lift_fresh_copy conj
to _to_copy type_as float double half bfloat16 cpu _autocast_to_full_precision _autocast_to_reduced_precision
"""
# Operations that may give something else, and those that compare.
_BREAK_ZERO = """
sigmoid log_sigmoid hardsigmoid softplus threshold exp exp2 log log2 log10 cos cosh acos erfc rsqrt reciprocal digamma
lgamma eq ne lt le gt ge isnan isinf isfinite logical_not bitwise_not logical_or bitwise_or __or__ __invert__
floor_divide remainder fmod fill
"""
_SUM_LIKE = "add sub rsub maximum minimum where lerp atan2 copy logaddexp logical_xor"
_PRODUCT_LIKE = "mul multiply logical_and bitwise_and __and__"


def broadcast(call: Call, values: Sequence[Value], shape: Sequence[int]) -> list[Axis]:
    """Return the axes of the result of broadcasting, with those of equal size tied together."""
    found: list[Axis] = []
    for dim, size in enumerate(shape):
        axis: Axis | None = None
        for value in values:
            place = dim - (len(shape) - len(value.axes))
            if place < 0 or size == 1 or size_of(value.axes[place]) != size:
                continue
            if axis is None:
                axis = value.axes[place]
            else:
                call.unify(axis, value.axes[place])
        found.append(new_axis(size) if axis is None else axis)
    return found


def dirty_of_sum(axes: Sequence[Axis], values: Sequence[Value], *, scalar: bool = False) -> frozenset[Factor]:
    """Return what a sum leaves dirty: units that are dirty in a term, or that a term does not have."""
    every = {leaf for axis in axes for leaf in leaves(axis)}
    if scalar:
        return frozenset(every)
    clean = set(every)
    for value in values:
        clean &= {leaf for axis in value.axes for leaf in leaves(axis)} - value.dirty_leaves()
    return frozenset(every - clean)


def dirty_of_product(axes: Sequence[Axis], values: Sequence[Value]) -> frozenset[Factor]:
    """Return what a product leaves dirty: units that are zero in none of the terms."""
    dirty = {leaf for axis in axes for leaf in leaves(axis)}
    for value in values:
        dirty -= {leaf for axis in value.axes for leaf in leaves(axis)} - value.dirty_leaves()
    return frozenset(dirty)


def kept_dirty(values: Sequence[Value]) -> frozenset[Factor]:
    """Return what is dirty in any of the values."""
    return frozenset(leaf for value in values for leaf in value.dirty_leaves())


@operation(*_KEEP_ZERO.split())
def _keep_zero(call: Call) -> Answer:
    if call.name == "prelu" and size_of(call["weight"].axes[0]) > 1:
        call.unify(call["self"].axes[1], call["weight"].axes[0])
        return Value(call["self"].axes, dirty=call["self"].dirty)
    return Value(broadcast(call, call.values[:1], call.shape), dirty=kept_dirty(call.values[:1]))


@operation(*_BREAK_ZERO.split())
def _break_zero(call: Call) -> Answer:
    axes = broadcast(call, call.values, call.shape)
    return Value(axes, dirty=dirty_of_sum(axes, (), scalar=True))


@operation(*_SUM_LIKE.split())
def _sum_like(call: Call) -> Answer:
    axes = broadcast(call, call.values, call.shape)
    numbers = [item for name, item in call.arguments.items() if name in ("self", "other") and _is_number(item)]
    _mark_residual(call)
    return Value(axes, dirty=dirty_of_sum(axes, call.values, scalar=any(number != 0 for number in numbers)))


@operation(*_PRODUCT_LIKE.split())
def _product_like(call: Call) -> Answer:
    axes = broadcast(call, call.values, call.shape)
    return Value(axes, dirty=dirty_of_product(axes, call.values))


@operation("div", "divide", "true_divide")
def _divide(call: Call) -> Answer:
    axes = broadcast(call, call.values, call.shape)
    numerator = [call["self"]] if isinstance(call["self"], Value) else []
    return Value(axes, dirty=dirty_of_product(axes, numerator))


@operation("addcmul", "addcdiv")
def _add_product(call: Call) -> Answer:
    axes = broadcast(call, call.values, call.shape)
    product = Value(axes, dirty=dirty_of_product(axes, [call["tensor1"], call["tensor2"]]))
    return Value(axes, dirty=dirty_of_sum(axes, [call["self"], product]))


@operation("pow", "clamp", "clamp_min", "clamp_max", "masked_fill")
def _with_numbers(call: Call) -> Answer:
    axes = broadcast(call, call.values, call.shape)
    low, high, exponent = call["min"], call["max"], call["exponent"]
    keeps = {
        "pow": _is_number(exponent) and exponent > 0,
        "masked_fill": call["value"] == 0 if _is_number(call["value"]) else False,
    }.get(call.name, all(map(_is_number_or_none, (low, high))) and (low or 0) <= 0 <= (high or 0))
    return Value(axes, dirty=kept_dirty(call.values[:1]) if keeps else dirty_of_sum(axes, (), scalar=True))


@operation(
    "mean", "var", "std", "amax", "amin", "logsumexp", "norm", "linalg_vector_norm", "prod", "var_mean", "median"
)
def _reduce(call: Call) -> Answer:
    """Reduce over axes; where one can be cut, what is left changes, as it does in a norm."""
    return _reduced(call, inexact=True)


@operation("sum", "any", "all", "count_nonzero")
def _sum(call: Call) -> Answer:
    """Sum over axes: units that are zero add nothing."""
    return _reduced(call, inexact=False)


def _reduced(call: Call, *, inexact: bool) -> Answer:
    value: Value = call["self"]
    dims = _dims(call, value)
    dirty = value.dirty_leaves()
    for dim in dims:
        axis = value.axes[dim]
        if inexact:
            mark_inexact(axis, call.reason("is averaged or compared over"))
            mark(axis, "spanned")
        else:
            for leaf in set(leaves(axis)) & dirty:
                mark_inexact([leaf], call.reason("is summed over where it is not zero"))
    keep = len(call.shape) == len(value.axes)
    axes = [[] if dim in dims else axis for dim, axis in enumerate(value.axes) if keep or dim not in dims]
    left = {leaf for axis in axes for leaf in leaves(axis)}
    results = tuple(Value(axes, dirty=frozenset(dirty & left)) for _ in call.shapes)
    return results if isinstance(call.node.meta["val"], tuple) else results[0]


def _dims(call: Call, value: Value) -> set[int]:
    given = call["dim"]
    if given is None or given == []:
        return set(range(len(value.axes)))
    return {dim % len(value.axes) for dim in (given if isinstance(given, list | tuple) else [given])}


@operation("max", "min")
def _extreme(call: Call) -> Answer:
    if isinstance(call["other"], Value):
        return _sum_like(call)
    return _reduced(call, inexact=True)


@operation(
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk", "argmax", "argmin"
)
def _along(call: Call) -> Answer:
    """Freeze the axis that the operation runs along; the others pass."""
    value: Value = call["self"]
    dim = call.dim(value, default=-1)
    freeze(value.axes[dim], call.reason("is compared along"))
    results = []
    for shape in call.shapes:
        axes = [axis if place != dim else None for place, axis in enumerate(value.axes)]
        if len(shape) < len(axes):
            del axes[dim]
        full = [
            call.frozen_axis(size, "is compared along") if axis is None else axis
            for axis, size in zip(axes, shape, strict=True)
        ]
        clean = call.name == "cumsum"
        results.append(Value(full, dirty=value.dirty if clean else dirty_of_sum(full, (), scalar=True)))
    return tuple(results) if isinstance(call.node.meta["val"], tuple) else results[0]


@operation(
    "zeros",
    "new_zeros",
    "zeros_like",
    "ones",
    "new_ones",
    "ones_like",
    "full",
    "new_full",
    "full_like",
    "empty",
    "new_empty",
    "empty_like",
    "scalar_tensor",
)
def _constant(call: Call) -> Answer:
    """Make a constant that is the same everywhere: it fits whatever it meets."""
    like = call["self"] if call.name.endswith("_like") else None
    axes = like.axes if like is not None else [new_axis(size) for size in call.shape]
    sizes = call["size"] if like is None and isinstance(call["size"], list) else []
    for place, (size, axis) in enumerate(zip(sizes, axes, strict=False)):
        call.used(size, axis, place)
    zero = call.name.split("_")[-1 if call.name.startswith("new_") else 0] == "zeros" or call["fill_value"] == 0
    return Value(axes, dirty=frozenset() if zero else dirty_of_sum(axes, (), scalar=True))


@operation("arange", "eye", "linspace", "tril_indices", "triu_indices", "rand", "randn", "randint", "hann_window")
def _positions(call: Call) -> Answer:
    return Value([call.frozen_axis(size, "counts positions") for size in call.shape])


@operation("tril", "triu")
def _triangle(call: Call) -> Answer:
    value: Value = call["self"]
    for axis in value.axes[-2:]:
        freeze(axis, call.reason("is compared with another axis by position"))
    return Value(value.axes, dirty=value.dirty)


def _mark_residual(call: Call) -> None:
    """Mark the axes of a residual stream: a sum of a value and something computed from it."""
    if len(call.values) != 2 or call.name not in ("add", "sub"):
        return
    first, second = call.values
    is_part = first.seen & second.seen in (first.seen, second.seen) and first.depth != second.depth
    if is_part and first.dynamic and second.dynamic and first.shape == second.shape:
        mark([factor for axis in first.axes for factor in axis], "residual")


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)


def _is_number_or_none(item: Any) -> bool:
    return item is None or _is_number(item)
