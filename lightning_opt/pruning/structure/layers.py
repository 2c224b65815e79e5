"""Rules for layers with weights: linear maps, convolutions, norms, pooling and interpolation."""

from collections.abc import Sequence

from lightning_opt.pruning.structure.axes import (
    Axis,
    Factor,
    freeze,
    leaves,
    mark,
    mark_inexact,
    new_axis,
    regroup,
    size_of,
)
from lightning_opt.pruning.structure.calls import Answer, Call, Value, operation
from lightning_opt.pruning.structure.pointwise import dirty_of_sum

_IN = ("in_features", "in_channels", "nx", "in_dim", "input_dim", "input_size")
_OUT = ("out_features", "out_channels", "nf", "out_dim", "output_dim")


def link_sizes(call: Call, weight: str, inputs: Axis, outputs: Axis, *, dim: int) -> None:
    """Note the numbers that the owner of a weight holds about its inputs and outputs, which are its axis `dim`."""
    owner = call.owner(weight)
    if owner is not None:
        call.walk.outputs.add((".".join(filter(None, owner)), dim))
        for module in {owner[0], call.module}:  # two where a weight is tied
            call.link(inputs, *_IN, module=module)
            call.link(outputs, *_OUT, module=module)


def lead_dirty(lead: Sequence[Axis], value: Value, *, bias: bool) -> frozenset[Factor]:
    """Return what a layer leaves dirty in the axes that it runs over: a bias is there for units of zeros too."""
    every = {leaf for axis in lead for leaf in leaves(axis)}
    return frozenset(every if bias else every & value.dirty_leaves())


@operation("linear")
def _linear(call: Call) -> Answer:
    value, weight, bias = call["input"], call["weight"], call["bias"]
    call.unify(value.axes[-1], weight.axes[1])
    if bias is not None:
        call.unify(weight.axes[0], bias.axes[0])
    link_sizes(call, "weight", weight.axes[1], weight.axes[0], dim=0)
    mark(weight.axes[0], "linear")
    call.cost(*value.axes[:-1], *weight.axes)
    dirty = lead_dirty(value.axes[:-1], value, bias=bias is not None)
    return Value([*value.axes[:-1], weight.axes[0]], dirty=dirty)


@operation("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv(call: Call) -> Answer:
    value, weight, bias = call["input"], call["weight"], call["bias"]
    transposed = "transpose" in call.name or bool(call["transposed"])
    groups = call["groups"] or 1
    batch = len(value.axes) - len(weight.axes) + 1  # 0 without a batch axis
    inputs = value.axes[batch]
    channels = _grouped(call, inputs, weight, groups, transposed=transposed)
    if channels is None:
        return call.refuse("has groups that do not follow the parts of its channels")
    if bias is not None:
        call.unify(channels, bias.axes[0])
    link_sizes(call, "weight", inputs, channels, dim=1 if transposed else 0)
    mark(channels, "conv")
    space = [call.frozen_axis(size, "is an axis of space") for size in call.shape[batch + 1 :]]
    for axis in [*value.axes[batch + 1 :], *weight.axes[2:]]:
        _freeze_space(call, axis)
    outside = value.axes[batch + 1 :] if transposed else space
    call.cost(*value.axes[:batch], *outside, *weight.axes)
    dirty = lead_dirty(value.axes[:batch], value, bias=bias is not None)
    return Value([*value.axes[:batch], channels, *space], dirty=dirty)


def _grouped(call: Call, inputs: Axis, weight: Value, groups: int, *, transposed: bool) -> Axis | None:
    """Tie the inputs of a convolution to its weight, and return the axis of its outputs.

    The weight of G groups is `(G * O, I, ...)`, transposed `(G * I, O, ...)`; the inputs are G * I, the outputs G * O.
    """
    first, second = weight.axes[0], weight.axes[1]
    if groups == 1:
        call.unify(inputs, first if transposed else second)
        return second if transposed else first
    parts = regroup([inputs], [groups, size_of(inputs) // groups])
    rows = regroup([first], [groups, size_of(first) // groups])
    if parts is None or rows is None:
        return None
    call.unify(parts[0], rows[0])
    call.unify(parts[1], rows[1] if transposed else second)
    call.link(parts[0], "groups")
    outputs = second if transposed else rows[1]
    mark(parts[1], "inner")
    mark(outputs, "inner")
    return [*rows[0], *outputs]


def _freeze_space(call: Call, axis: Axis) -> None:
    freeze(axis, call.reason("is an axis of space"))


@operation(
    "batch_norm",
    "instance_norm",
    "_native_batch_norm_legit_no_training",
    "native_batch_norm",
    "_batch_norm_with_update",
)
def _batch_norm(call: Call) -> Answer:
    """Normalise each channel by itself."""
    value: Value = call["input"]
    channels = value.axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call[name] is not None:
            call.unify(channels, call[name].axes[0])
            if owner := call.owner(name):
                call.link(channels, "num_features", module=owner[0])
    clean = set(leaves(channels)) if call["weight"] is not None else set()
    result = Value(list(value.axes), dirty=frozenset(dirty_of_sum(value.axes, (), scalar=True) - clean))
    return (result, Value([]), Value([])) if isinstance(call.node.meta["val"], tuple) else result


@operation("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> Answer:
    """Normalise over the last axes: what is cut there changes the statistics of the rest."""
    value: Value = call["input"]
    shape = call["normalized_shape"]
    spanned = value.axes[len(value.axes) - len(shape) :]
    for axis in spanned:
        mark_inexact(axis, call.reason("is spanned by a norm"))
        mark(axis, "spanned")
    for name in ("weight", "bias"):
        for axis, other in zip(spanned, call[name].axes if call[name] is not None else (), strict=False):
            call.unify(axis, other)
    owner = call.owner("weight") if call["weight"] is not None else None
    for place, axis in enumerate(spanned):
        call.link(axis, "normalized_shape", module=owner[0] if owner else None, item=place)
    clean = {leaf for axis in spanned for leaf in leaves(axis)} if call["weight"] is not None else set()
    result = Value(list(value.axes), dirty=frozenset(dirty_of_sum(value.axes, (), scalar=True) - clean))
    return (result, Value([]), Value([])) if isinstance(call.node.meta["val"], tuple) else result


@operation("group_norm", "native_group_norm")
def _group_norm(call: Call) -> Answer:
    """Normalise within groups of channels: whole groups go, or the same places within each."""
    value: Value = call["input"]
    groups = call["num_groups"] or call["group"]
    for name in ("weight", "bias"):
        if call[name] is not None:
            call.unify(value.axes[1], call[name].axes[0])
            if owner := call.owner(name):
                call.link(value.axes[1], "num_channels", module=owner[0])
    parts = regroup([value.axes[1]], [groups, size_of(value.axes[1]) // groups])
    if parts is None:
        return call.refuse("has groups that do not follow the parts of its channels")
    call.link(parts[0], "num_groups", "groups")
    mark_inexact(parts[1], call.reason("is spanned by a norm"))
    mark(parts[1], "spanned", *(["inner"] if groups > 1 else []))
    clean = set(leaves(value.axes[1])) if call["weight"] is not None else set()
    result = Value(list(value.axes), dirty=frozenset(dirty_of_sum(value.axes, (), scalar=True) - clean))
    return (result, Value([]), Value([])) if isinstance(call.node.meta["val"], tuple) else result


@operation(
    *(f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(f"_adaptive_avg_pool{n}d" for n in (2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
)
def _pool(call: Call) -> Answer:
    """Pool over the last axes, each channel by itself."""
    value: Value = call["self"]
    return _over_space(call, value, int(call.name.partition("pool")[2][0]))


@operation(
    *(
        f"upsample_{kind}"
        for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    )
)
def _upsample(call: Call) -> Answer:
    value: Value = call["input"] if call["input"] is not None else call["self"]
    return _over_space(call, value, int(call.name[-2]))


def _over_space(call: Call, value: Value, count: int) -> Answer:
    for axis in value.axes[-count:]:
        _freeze_space(call, axis)
    lead = value.axes[:-count]
    results = [
        Value([*lead, *(call.frozen_axis(size, "is an axis of space") for size in shape[-count:])], dirty=value.dirty)
        for shape in call.shapes
    ]
    return tuple(results) if isinstance(call.node.meta["val"], tuple) else results[0]


@operation("_weight_norm", "_weight_norm_interface")
def _weight_norm(call: Call) -> Answer:
    """Scale each row of a weight to a given length."""
    direction, length = call["v"], call["g"]
    dim = call["dim"] % len(direction.axes)
    call.unify(direction.axes[dim], length.axes[dim])
    for axis in direction.axes:  # rows too: one of zeros has no direction
        mark_inexact(axis, call.reason("is part of a weight of unit length"))
    result = Value(list(direction.axes))
    return (result, Value([new_axis(size) for size in call.shapes[1]])) if len(call.shapes) > 1 else result
