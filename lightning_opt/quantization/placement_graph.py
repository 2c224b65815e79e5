"""The record of a forward as placement reads it: layers as one step each, and values that are one for a grid.

A grid of one scale commutes with functions that only move values about or pick some of them, such as `reshape`, `split`
and max pooling. What they give is an alias of what they read: whoever reads it, reads its root.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_opt.quantization.calls import Call, CallGraph, Run

MOVES = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "T", "mT", "swapaxes", "swapdims", "t"),
        *("movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat", "view_as"),
        *("reshape_as", "contiguous", "clone", "detach", "data", "alias", "requires_grad", "chunk", "split", "narrow"),
        *("tensor_split", "unbind", "getitem", "select", "index_select", "roll", "flip", "channel_shuffle", "tile"),
        *("pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle", "dropout", "dropout1d", "dropout2d"),
        *("dropout3d", "feature_dropout", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices"),
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d"),
        *("adaptive_max_pool3d", "amax", "repeat_interleave"),
    }
)
CASTS = frozenset({"to", "float", "type_as", "type", "half", "bfloat16", "double"})
DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"})


@dataclass(frozen=True, eq=False)
class Step:
    """A layer's forward, or a call of a function outside of layers.

    Attributes:
        number: Its place in the order.
        function: The function's common name; "" for a layer.
        layer: The layer's full name; "" for a function.
        run: The layer's own forward, or the one that called the function.
        inputs: The values that it reads.
        outputs: The values that it gives.
        at: The number of its (first) call.
        call: The call; None for a layer.
    """

    number: int
    function: str
    layer: str
    run: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    at: int
    call: Call | None = None

    @property
    def name(self) -> str:
        """Return what to call it in a message."""
        return self.layer or self.function


class Steps:
    """The steps of a record, with roots and readers of values.

    Args:
        graph: The record.
        layers: Full names of the modules that are one step each.
        aside: Full names of modules whose calls are left out.
    """

    def __init__(self, graph: CallGraph, layers: Collection[str], *, aside: Collection[str] = ()) -> None:
        self.graph = graph
        self.aside = frozenset(aside)
        self.layers = frozenset(layers)
        self.steps = tuple(self._build())
        self.maker: dict[int, Step] = {}
        self.alias_of: dict[int, tuple[int, Step]] = {}
        for step in self.steps:
            for value in step.outputs:
                if value not in step.inputs:
                    self.maker[value] = step
            moved = self.moved(step)
            if moved is not None:
                for value in step.outputs:
                    if value != moved:
                        self.alias_of[value] = (moved, step)

    def _build(self) -> Iterator[Step]:
        inside: dict[int, Run | None] = {}
        for run in self.graph.runs:
            around = inside.get(run.parent) if run.parent is not None else None
            inside[run.number] = around or (run if run.path in self.layers else None)
        begun: set[int] = set()
        count = 0
        for call in self.graph.calls:
            layer = inside[call.run]
            if layer is None and self.graph.path_of(call) in self.aside:
                continue
            if layer is None:
                yield Step(count, call.function, "", call.run, call.inputs, call.outputs, call.number, call)
                count += 1
            elif layer.number not in begun:
                begun.add(layer.number)
                given = tuple(value for value in layer.given if value is not None)
                returned = tuple(value for value in layer.returned if value is not None)
                yield Step(count, "", layer.path, layer.number, given, returned, layer.start)
                count += 1

    def moved(self, step: Step) -> int | None:
        """Return the value that a step only moves about, None if it does more."""
        call = step.call
        if call is None or not call.inputs or call.function == "setitem":
            return None
        values = self.graph.values
        if call.function in MOVES or (call.function == "pad" and _pads_zeros(call)):
            return call.inputs[0]
        if call.function in CASTS and all(values[value].is_floating for value in (call.inputs[0], *call.outputs)):
            return call.inputs[0]
        return None

    def root(self, value: int) -> int:
        """Return the value that this one is an alias of, itself if it is none."""
        while value in self.alias_of:
            value = self.alias_of[value][0]
        return value

    def chain(self, value: int) -> list[int]:
        """Return a value, what it is an alias of, and so on to the root."""
        found = [value]
        while found[-1] in self.alias_of:
            found.append(self.alias_of[found[-1]][0])
        return found

    def drops(self, value: int) -> bool:
        """Return whether there is a dropout that acts in training between the root and a value."""
        while value in self.alias_of:
            if value in self._dropped:
                return True
            value = self.alias_of[value][0]
        return value in self._dropped

    @cached_property
    def _dropped(self) -> frozenset[int]:
        # In eval a dropout returns the very tensor that it is given.
        acting = (step for step in self.steps if step.function in DROPOUTS and step.call is not None)
        return frozenset(step.inputs[0] for step in acting if step.inputs and _probability(step.call) > 0)

    @cached_property
    def readers(self) -> dict[int, tuple[tuple[Step, int], ...]]:
        """For each root, who reads it, and the alias that is read; steps that only move it do not count."""
        found: dict[int, list[tuple[Step, int]]] = {}
        for step in self.steps:
            moved = self.moved(step)
            for value in dict.fromkeys(step.inputs):
                if value != moved:
                    found.setdefault(self.root(value), []).append((step, value))
        return {root: tuple(readers) for root, readers in found.items()}

    @cached_property
    def returned(self) -> frozenset[int]:
        """The roots that the model returns."""
        return frozenset(self.root(value) for value in self.graph.runs[0].returned if value is not None)

    def sole_reader(self, value: int) -> Step | None:
        """Return the only step that reads a value, if it reads the value itself and the model does not return it."""
        root = self.root(value)
        readers = self.readers.get(root, ())
        if root != value or root in self.returned or len(readers) != 1 or readers[0][1] != value:
            return None
        return readers[0][0]

    def path(self, step: Step) -> str:
        """Return the full name of the layer, or of the module that called the function."""
        return self.graph.runs[step.run].path


def _pads_zeros(call: Call) -> bool:
    mode = call.kwargs.get("mode", call.args[2] if len(call.args) > 2 else "constant")
    value = call.kwargs.get("value", call.args[3] if len(call.args) > 3 else None)
    return mode != "constant" or not value


def _probability(call: Call | None) -> float:
    if call is None:
        return 0.0
    given: Any = call.kwargs.get("p", call.args[1] if len(call.args) > 1 else 0.5)
    return float(given) if isinstance(given, int | float) else 0.5
