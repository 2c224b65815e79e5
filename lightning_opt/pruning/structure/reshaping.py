"""Rules for operations that move, cut and join axes."""

from typing import Any

import torch

from lightning_opt.pruning.structure.axes import (
    Axis,
    freeze,
    new_axis,
    regroup,
    size_of,
    split,
    sum_axis,
)
from lightning_opt.pruning.structure.pointwise import broadcast, dirty_of_sum, kept_dirty
from lightning_opt.pruning.structure.program import tensor_nodes
from lightning_opt.pruning.structure.walk import Answer, Call, Value, operation


@operation("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _view(call: Call) -> Answer:
    value: Value = call["self"]
    axes = regroup(value.axes, call.shape)
    if axes is None:
        return call.refuse("is viewed in a way that does not follow its parts", value.axes)
    literals = (
        call["sizes"] if call.name == "unflatten" else call["size"] if call["size"] is not None else call["shape"]
    )
    if isinstance(literals, list):
        first, offset = (call.dim(value), 1) if call.name == "unflatten" else (0, 0)
        for place, (literal, axis) in enumerate(zip(literals, axes[first:], strict=False)):
            call.used(literal, axis, place + offset)
    return Value(axes, dirty=value.dirty)


@operation(
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "matrix_H",
    "mH",
    "adjoint",
    "swapaxes",
    "swapdims",
    "movedim",
    "moveaxis",
)
def _permute(call: Call) -> Answer:
    value: Value = call["self"]
    return Value([value.axes[dim] for dim in _order(call, len(value.axes))], dirty=value.dirty)


def _order(call: Call, rank: int) -> list[int]:
    order = list(range(rank))
    if call.name == "permute":
        return [dim % rank for dim in call["dims"]]
    if call.name in ("t", "numpy_T"):
        return order[::-1]
    if call.name in ("movedim", "moveaxis"):
        sources, targets = _as_list(call["source"]), _as_list(call["destination"])
        moved = dict(zip((dim % rank for dim in targets), (dim % rank for dim in sources), strict=True))
        rest = iter([dim for dim in order if dim not in moved.values()])
        return [moved[dim] if dim in moved else next(rest) for dim in order]
    names = {"swapaxes": ("axis0", "axis1"), "swapdims": ("dim0", "dim1"), "transpose": ("dim0", "dim1")}.get(call.name)
    a, b = (call[names[0]] % rank, call[names[1]] % rank) if names else (rank - 2, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order


@operation("expand", "expand_as", "broadcast_to", "broadcast_in_dim")
def _expand(call: Call) -> Answer:
    value: Value = call["self"]
    axes = broadcast(call, [value], call.shape)
    for place, (literal, axis) in enumerate(zip(call["size"] or (), axes, strict=False)):
        call.used(literal, axis, place)
    return Value(axes, dirty=dirty_of_sum(axes, [value]))


@operation("repeat", "tile")
def _repeat(call: Call) -> Answer:
    value: Value = call["self"]
    counts = call["repeats"] if call.name == "repeat" else call["dims"]
    rank = len(call.shape)
    old: list[Axis] = [[] for _ in range(rank - len(value.axes))] + value.axes
    counts = [1] * (rank - len(counts)) + list(counts)
    fresh = [new_axis(count) for count in counts]
    for place, (count, axis) in enumerate(zip(counts, fresh, strict=True)):
        call.used(count, axis, place)
    axes = [[*times, *axis] for times, axis in zip(fresh, old, strict=True)]
    return Value(axes, dirty=dirty_of_sum(axes, [value]))


@operation("repeat_interleave")
def _repeat_interleave(call: Call) -> Answer:
    value: Value = call["self"]
    if not isinstance(call["repeats"], int) or call["dim"] is None:
        return call.refuse("is repeated by counts from the data")
    dim, times = call.dim(value), new_axis(call["repeats"])
    call.used(call["repeats"], times, 0)
    axes = [*value.axes[:dim], [*value.axes[dim], *times], *value.axes[dim + 1 :]]
    return Value(axes, dirty=dirty_of_sum(axes, [value]))


@operation("split", "split_with_sizes", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split")
def _split(call: Call) -> Answer:
    value: Value = call["self"]
    dim = call.dim(value)
    sizes = [shape[dim] for shape in call.shapes]
    parts = split(value.axes[dim], sizes)
    if parts is None:
        return call.refuse("is split in a way that does not follow its parts", [value.axes[dim]])
    literals = call["split_size"] if call["split_size"] is not None else call["split_sizes"]
    for place, (literal, part) in enumerate(zip(_as_list(literals), parts, strict=False)):
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
    sizes = [part for part in (start, end - start, size - end) if part]
    parts = split(axis, sizes) if end > start else None
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


@operation("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(call: Call) -> Answer:
    """Move r x r neighbours between channels and space: C*r*r, H, W <-> C, H*r, W*r."""
    value: Value = call["self"]
    *lead, channels, height, width = value.axes
    up = call.name == "pixel_shuffle"
    r = call["upscale_factor" if up else "downscale_factor"]
    if up:
        parts = regroup([channels], [call.shape[-3], r, r])
        result = parts and [parts[0], [*height, *parts[1]], [*width, *parts[2]]]
    else:
        rows, columns = regroup([height], [size_of(height) // r, r]), regroup([width], [size_of(width) // r, r])
        result = rows and columns and [[*channels, *rows[1], *columns[1]], rows[0], columns[0]]
    if not result:
        return call.refuse("is shuffled in a way that does not follow its parts", value.axes)
    for axis in result[-2:]:
        freeze(axis, call.reason("is an axis of space"))
    return Value([*lead, *result], dirty=value.dirty)


@operation("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(call: Call) -> Answer:
    value: Value = call["self"]
    groups = call["groups"]
    parts = regroup([value.axes[1]], [groups, size_of(value.axes[1]) // groups])
    if parts is None:
        return call.refuse("is shuffled in a way that does not follow its parts", value.axes)
    call.link(parts[0], "groups")
    return Value([value.axes[0], [*parts[1], *parts[0]], *value.axes[2:]], dirty=value.dirty)


@operation("roll", "flip")
def _roll(call: Call) -> Answer:
    value: Value = call["self"]
    for dim in _as_list(call["dims"]) or range(len(value.axes)):
        freeze(value.axes[dim], call.reason("is moved along"))
    return Value(list(value.axes), dirty=value.dirty)


@operation("index")
def _index(call: Call) -> Answer:
    """Pick entries by tensors of places: the axes that are picked from are frozen, the others pass."""
    value: Value = call["self"]
    indices: list[Any] = list(call["indices"]) + [None] * (len(value.axes) - len(call["indices"]))
    chosen = [dim for dim, index in enumerate(indices) if index is not None]
    ranks = [len(index.axes) for index in indices if index is not None]
    masks = [node for node in tensor_nodes(call.node.args[1]) if node.meta["val"].dtype in (torch.bool, torch.uint8)]
    if masks:
        return call.refuse("is picked by a mask")
    for dim in chosen:
        freeze(value.axes[dim], call.reason("has entries that are picked by place"))
    for index in (index for index in indices if index is not None):
        call.walk.freeze(index, call.reason("holds places"))
    picked = [call.frozen_axis(size, "is an axis of places") for size in _picked_shape(call, chosen, max(ranks))]
    rest = [axis for dim, axis in enumerate(value.axes) if dim not in chosen]
    together = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    at = chosen[0] if together else 0
    return Value([*rest[:at], *picked, *rest[at:]], dirty=value.dirty)


def _picked_shape(call: Call, chosen: list[int], rank: int) -> list[int]:
    together = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    at = chosen[0] if together else 0
    return call.shape[at : at + rank]


@operation("index_select", "embedding")
def _rows(call: Call) -> Answer:
    table: Value = call["self"] if call.name == "index_select" else call["weight"]
    places: Value = call["index"] if call.name == "index_select" else call["indices"]
    dim = call.dim(table) if call.name == "index_select" else 0
    freeze(table.axes[dim], call.reason("holds rows that are picked by the values of the data"))
    axes = [*table.axes[:dim], *places.axes, *table.axes[dim + 1 :]]
    if call.name == "embedding" and (owner := call.owner("weight")):
        call.link(table.axes[1], "embedding_dim", module=owner[0])
        call.walk.outputs.add((".".join(filter(None, owner)), 1))
    return Value(axes, dynamic=places.dynamic, dirty=table.dirty)


@operation("gather", "take_along_dim")
def _gather(call: Call) -> Answer:
    value, index = call["self"], call["index"] if call.name == "gather" else call["indices"]
    dim = call.dim(value)
    freeze(value.axes[dim], call.reason("has entries that are picked by the values of the data"))
    freeze(index.axes[dim], call.reason("holds places"))
    for place, (axis, other) in enumerate(zip(value.axes, index.axes, strict=True)):
        if place == dim:
            continue
        if size_of(axis) == size_of(other):
            call.unify(axis, other)
        else:
            freeze(axis, call.reason("is gathered in part"))
    return Value(list(index.axes), dirty=dirty_of_sum(index.axes, [value]))


@operation("unfold", "im2col", "col2im")
def _unfold(call: Call) -> Answer:
    return call.refuse("is cut into overlapping windows")


@operation("diagonal")
def _diagonal(call: Call) -> Answer:
    return call.refuse("is read along a diagonal")


def _as_list(item: Any) -> list[int]:
    return list(item) if isinstance(item, list | tuple) else [item]
