"""Rules for operations that view, move and repeat axes."""

from lightning_opt.pruning.structure.axes import (
    Axis,
    freeze,
    new_axis,
    regroup,
    size_of,
)
from lightning_opt.pruning.structure.calls import Answer, Call, Value, operation
from lightning_opt.pruning.structure.pointwise import broadcast, dirty_of_sum
from lightning_opt.pruning.structure.slicing import as_list


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
        sources, targets = as_list(call["source"]), as_list(call["destination"])
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
