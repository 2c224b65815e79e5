"""Rules for operations that cut axes into parts and join them."""

from typing import Any

from lightning_opt.pruning.structure.axes import Axis, freeze, new_axis, regroup, size_of, split, sum_axis
from lightning_opt.pruning.structure.calls import Answer, Call, Value, operation
from lightning_opt.pruning.structure.pointwise import broadcast, dirty_of_sum, kept_dirty


@operation("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split")
def _split(call: Call) -> Answer:
    value: Value = call["self"]
    dim = call.dim(value)
    sizes = [shape[dim] for shape in call.shapes]
    parts = split(value.axes[dim], sizes)
    if parts is None:
        return call.refuse("is split in a way that does not follow its parts", [value.axes[dim]])
    literals = call["split_size"] if call["split_size"] is not None else call["split_sizes"]
    for place, (literal, part) in enumerate(zip(as_list(literals), parts, strict=False)):
        call.used(literal, part, place)
    if not isinstance(literals, list) and len(set(sizes)) == 1:
        for part in parts[1:]:  # the code asks for parts of one size, whatever the sizes are
            call.unify(parts[0], part)
    return tuple(Value([*value.axes[:dim], part, *value.axes[dim + 1 :]], dirty=value.dirty) for part in parts)


@operation("glu")
def _gated(call: Call) -> Answer:
    """Multiply the first half by the sigmoid of the second."""
    value: Value = call["self"]
    dim = call.dim(value, default=-1)
    parts = split(value.axes[dim], [call.shape[dim]] * 2)
    if parts is None:
        return call.refuse("is split in a way that does not follow its parts", [value.axes[dim]])
    call.unify(*parts)
    return Value([*value.axes[:dim], parts[0], *value.axes[dim + 1 :]], dirty=value.dirty)


@operation("unbind")
def _unbind(call: Call) -> Answer:
    value: Value = call["self"]
    dim = call.dim(value)
    freeze(value.axes[dim], call.reason("is taken apart entry by entry"))
    rest = [*value.axes[:dim], *value.axes[dim + 1 :]]
    return tuple(Value(list(rest), dirty=value.dirty) for _ in call.shapes)


@operation("select")
def _select(call: Call) -> Answer:
    value: Value = call["self"]
    dim = call.dim(value)
    freeze(value.axes[dim], call.reason("has one entry that is picked by its place"))
    return Value([*value.axes[:dim], *value.axes[dim + 1 :]], dirty=value.dirty)


@operation("slice", "narrow")
def _slice(call: Call) -> Answer:
    value: Value = call["self"]
    dim = call.dim(value)
    axis, size = value.axes[dim], size_of(value.axes[dim])
    start, end, step = _range(call, size)
    if (start, end, step) == (0, size, 1):
        part: Axis | None = axis
    elif step != 1:
        part = _strided(call, axis, start, end, step)
    else:
        part = _range_of(call, axis, start, end)
    if part is None:
        freeze(axis, call.reason("is sliced in a way that does not follow its parts"))
        part = call.frozen_axis(call.shape[dim], "is sliced in a way that does not follow its parts")
    return Value([*value.axes[:dim], part, *value.axes[dim + 1 :]], dirty=value.dirty)


def _range(call: Call, size: int) -> tuple[int, int, int]:
    start = call["start"] or 0
    end = start + call["length"] if call.name == "narrow" else call["end"]
    start, stop, step = slice(start, end, call["step"] or 1).indices(size)
    return start, max(start, stop), step


def _range_of(call: Call, axis: Axis, start: int, end: int) -> Axis | None:
    size = size_of(axis)
    if end == start:
        return new_axis(0)
    parts = split(axis, [part for part in (start, end - start, size - end) if part])
    if parts is None:
        return None
    if start:
        call.used(start, parts[0], 0)
    chosen = parts[1 if start else 0]
    call.used(end, sum_axis([parts[0], chosen]) if start else chosen, 1)
    return chosen


def _strided(call: Call, axis: Axis, start: int, end: int, step: int) -> Axis | None:
    """Take every `step`-th entry: the rows of the axis seen as rows of `step` entries."""
    size = size_of(axis)
    if size % step or start >= step or end != size:
        return None
    parts = regroup([axis], [size // step, step])
    if parts is None:
        return None
    freeze(parts[1], call.reason("has entries that are picked by their place"))
    return parts[0]


@operation("cat", "concat", "concatenate")
def _cat(call: Call) -> Answer:
    values = [value for value in call["tensors"] if value.axes and value.shape != [0]]
    dim = call.dim(values[0])
    rest = [Value([*value.axes[:dim], [], *value.axes[dim + 1 :]]) for value in values]
    axes = broadcast(call, rest, [size if place != dim else 1 for place, size in enumerate(call.shape)])
    axes[dim] = sum_axis([value.axes[dim] for value in values])
    return Value(axes, dirty=kept_dirty(values))


@operation("stack")
def _stack(call: Call) -> Answer:
    values = call["tensors"]
    dim = call["dim"] % len(call.shape)
    axes = broadcast(call, values, values[0].shape)
    axes.insert(dim, sum_axis([[] for _ in values]) if len(values) > 1 else [])
    return Value(axes, dirty=kept_dirty(values))


@operation("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def _pad(call: Call) -> Answer:
    value: Value = call["self"]
    axes = list(value.axes)
    constant = call.name == "constant_pad_nd" or call["mode"] == "constant"
    for place in range(len(call["pad" if call["pad"] is not None else "padding"]) // 2):
        before, after = (call["pad"] or call["padding"])[2 * place : 2 * place + 2]
        dim = len(axes) - 1 - place
        if before == after == 0:
            continue
        if constant and before >= 0 and after >= 0:
            ends = [call.frozen_axis(size, "is padding of a fixed width") for size in (before, after)]
            terms = [ends[0], axes[dim], ends[1]]
            axes[dim] = sum_axis([term for term, size in zip(terms, (before, 1, after), strict=True) if size])
        else:
            freeze(axes[dim], call.reason("is padded from its own entries"))
            axes[dim] = call.frozen_axis(call.shape[dim], "is padded from its own entries")
    clean = constant and not call["value"]
    return Value(axes, dirty=value.dirty if clean else dirty_of_sum(axes, (), scalar=True))


def as_list(item: Any) -> list[int]:
    """Return a number or a list of them as a list."""
    return list(item) if isinstance(item, list | tuple) else [item]
