"""One operation of a program as its rule sees it, and the table of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch.fx import Node

from lightning_opt.pruning.structure.axes import Axis, Factor, Reason, freeze, leaves, new_axis, size_of, unify
from lightning_opt.pruning.structure.program import common_name, module_of, tensor_nodes

if TYPE_CHECKING:
    from lightning_opt.pruning.structure.walk import Walk


@dataclass
class Value:
    """What is known of one tensor of the program.

    Attributes:
        axes: One axis for each dim.
        dynamic: Depends on the model's inputs; False for parameters and what is computed from them alone.
        dirty: Factors whose units need not be zero here once the parameters' units are.
        seen: Bit set of the values that this one is computed from, itself included.
        depth: Number of linear maps and convolutions on the longest way from the inputs.
    """

    axes: list[Axis]
    dynamic: bool = False
    dirty: frozenset[Factor] = frozenset()
    seen: int = 0
    depth: int = 0

    def dirty_leaves(self) -> set[Factor]:
        """Return `dirty` as the plain factors of now."""
        return set(leaves(list(self.dirty)))

    def freeze(self, reason: Reason) -> None:
        """Freeze every axis."""
        for axis in self.axes:
            freeze(axis, reason)

    @property
    def shape(self) -> list[int]:
        """Return the size of each dim."""
        return [size_of(axis) for axis in self.axes]


Answer: TypeAlias = Value | tuple[Value, ...] | None


@dataclass(frozen=True)
class Link:
    """A number in a module that says how many entries an axis has.

    Attributes:
        module: Full name of the module.
        size: The number, as it is now.
        axis: The axis that it counts.
        names: Attribute names that may hold it; empty means any name.
        place: Where an operation was handed the number: its name, which of the module's calls of it, and the place
            among its numbers.
        item: Which item of the attribute it is, where that is a tuple.
    """

    module: str
    size: int
    axis: Axis
    names: tuple[str, ...] = ()
    place: tuple[str, int, int] | None = None
    item: int = 0


_MINOR = frozenset(
    {
        *("is an axis of space", "is taken apart entry by entry", "has one entry that is picked by its place"),
        *("counts gates", "is padding of a fixed width"),
    }
)


class Call:
    """One operation of the program with its arguments by name; tensors are `Value`s."""

    def __init__(self, walk: Walk, node: Node, name: str) -> None:
        self.walk, self.node, self.name = walk, node, name.rstrip("_") if not name.startswith("__") else name
        self.module = module_of(node)
        self.arguments = self._bind()
        self.values = list(values_in(list(self.arguments.values())))
        self.shapes = shapes_in(node.meta.get("val"))
        self.turn = walk.turn_of(self.module, common_name(self.name))

    @property
    def shape(self) -> list[int]:
        """Return the shape of the (first) result."""
        return self.shapes[0]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def run(self) -> Answer:
        """Apply the operation's rule, or freeze everything it touches when there is none."""
        rule = OPERATIONS.get(self.name)
        if rule is None:
            return self.refuse("is used by an operation that has no rule")
        try:
            answer = rule(self)
            found = next(values_in(answer)).shape
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration):  # what the rule does not foresee
            found = None
        known = all(self.walk.values.get(node) is not None for node in self._tensor_nodes())
        if found != self.shape or not known:
            return self.refuse("is used by an operation in a form that its rule does not know")
        return answer

    def _tensor_nodes(self) -> list[Node]:
        nodes = tensor_nodes([list(self.node.args), dict(self.node.kwargs)])
        return [node for node in nodes if hasattr(node.meta.get("val"), "shape")]

    def refuse(self, why: str, axes: Sequence[Axis] | None = None) -> Answer:
        """Freeze `axes` (every axis of the inputs by default) and return results that are frozen."""
        reason = self.reason(why)
        for axis in axes if axes is not None else [axis for value in self.values for axis in value.axes]:
            freeze(axis, reason)
        results = [Value([new_axis(size) for size in shape]) for shape in self.shapes]
        for result in results:
            result.freeze(reason)
        many = isinstance(self.node.meta.get("val"), tuple | list)
        return tuple(results) if many else results[0]

    def reason(self, why: str) -> Reason:
        """Return a reason that names this operation and its module."""
        return Reason(why, f"{self.name} in {self.module or 'the model'}", minor=why in _MINOR)

    def unify(self, first: Axis, second: Axis) -> None:
        """Tie two axes together, with this operation as the place."""
        unify(first, second, self.reason(f"at {self.name}"))

    def frozen_axis(self, size: int, why: str) -> Axis:
        """Return a fresh axis that cannot be cut."""
        axis = new_axis(size)
        freeze(axis, self.reason(why))
        return axis

    def link(self, axis: Axis, *names: str, module: str | None = None, item: int = 0) -> None:
        """Note that attributes of such names, in this module or the one given, count an axis."""
        where = self.module if module is None else module
        self.walk.links.append(Link(where, size_of(axis), axis, names, item=item))

    def used(self, size: Any, axis: Axis, place: int) -> None:
        """Note that the operation was handed the size of an axis, as its number `place`."""
        if isinstance(size, int) and size == size_of(axis) and size > 1:
            self.walk.links.append(Link(self.module, size, axis, place=(common_name(self.name), self.turn, place)))

    def dim(self, value: Value, name: str = "dim", default: int = 0) -> int:
        """Return an argument that is a dim of `value`, counted from 0."""
        dim = self[name]
        return (default if dim is None else int(dim)) % max(len(value.axes), 1)

    def cost(self, *axes: Axis) -> None:
        """Note multiply-accumulates: the product of the axes' sizes."""
        self.walk.costs.append([list(axis) for axis in axes])

    def owner(self, name: str) -> tuple[str, str] | None:
        """Return the module and the leaf name of the parameter that an argument is, if it is one."""
        index = [argument.name for argument in self._schema()].index(name)
        node = self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(name)
        full = self.walk._program.tensors.get(node.name) if isinstance(node, Node) else None
        if full is None:
            return None
        module, _, leaf = full.rpartition(".")
        return module, leaf

    def _schema(self) -> list[Any]:
        schema = getattr(self.node.target, "_schema", None)
        return list(schema.arguments) if schema is not None else []

    def _bind(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        given = list(self.node.args)
        for place, argument in enumerate(self._schema()):
            default = argument.default_value if argument.has_default_value() else None
            raw = given[place] if place < len(given) else self.node.kwargs.get(argument.name, default)
            found[argument.name] = self.walk._read(raw)
        if not found:
            found = {str(place): self.walk._read(raw) for place, raw in enumerate(given)}
        return found


Rule: TypeAlias = Callable[[Call], Answer]

OPERATIONS: dict[str, Rule] = {}


def operation(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of one or more operations: "conv2d", or "mylib::op" for operations outside ATen."""

    def register(rule: Rule) -> Rule:
        for name in names:
            OPERATIONS[name] = rule
        return rule

    return register


def values_in(found: Any) -> Iterator[Value]:
    """Yield the values inside an argument or an answer, in order."""
    if isinstance(found, Value):
        yield found
    elif isinstance(found, tuple | list):
        for item in found:
            yield from values_in(item)


def shapes_in(value: Any) -> list[list[int]]:
    """Return the shapes of the tensors inside a node's example value."""
    if isinstance(value, tuple | list):
        return [shape for item in value for shape in shapes_in(item)]
    return [[int(size) for size in value.shape]] if hasattr(value, "shape") else []
