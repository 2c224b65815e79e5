"""Rules for operations that pick entries by their place or by the data."""

from typing import Any

import torch

from lightning_opt.pruning.structure.axes import freeze, size_of
from lightning_opt.pruning.structure.calls import Answer, Call, Value, operation
from lightning_opt.pruning.structure.pointwise import dirty_of_sum
from lightning_opt.pruning.structure.program import tensor_nodes
from lightning_opt.pruning.structure.slicing import as_list


@operation("roll", "flip")
def _roll(call: Call) -> Answer:
    value: Value = call["self"]
    for dim in as_list(call["dims"]) or range(len(value.axes)):
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
        index.freeze(call.reason("holds places"))
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
