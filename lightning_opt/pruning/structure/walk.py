"""The walk along a program: each operation says what it does to axes, and the table of operations."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_opt.pruning.structure.axes import Axis, Factor, Reason, freeze, leaves, new_axis, size_of, unify
from lightning_opt.pruning.structure.program import Program, common_name, module_of, operation_name


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

    @property
    def shape(self) -> list[int]:
        """Return the size of each dim."""
        return [size_of(axis) for axis in self.axes]


Answer: TypeAlias = "Value | tuple[Value, ...] | None"


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


# Each operation of a program in order: its name, its module and, of each tensor that it gives, the axes.
Shapes: TypeAlias = list[tuple[str, str, list[list[Axis]]]]


class Walk:
    """Goes through a program once and ties axes together.

    Attributes:
        values: What is known of each node.
        tensors: The axes of each parameter and buffer.
        links: Numbers in modules that count entries of axes.
        costs: For each product of matrices and each convolution, the axes whose sizes multiply to its
            multiply-accumulates.
        shapes: Every operation with the axes of its results.
        outputs: Axes of parameters, by name and dim, that are the outputs of a layer.
    """

    def __init__(self, program: Program, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self.values: dict[Node, Answer] = {}
        self.tensors: dict[str, list[Axis]] = {}
        self.links: list[Link] = []
        self.costs: list[list[Axis]] = []
        self.shapes: Shapes = []
        self.outputs: set[tuple[str, int]] = set()
        self._program = program
        self._actual = {**parameters, **buffers}
        self._buffers = frozenset(buffers)
        self._count = 0
        self._turns: dict[tuple[str, str], int] = {}
        self._run(program.graph, None)

    def _run(self, graph: GraphModule, operands: Sequence[Answer] | None) -> Answer:
        """Walk a graph, or one that is nested in it with its placeholders bound to `operands`."""
        given = iter(operands or ())
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node) if operands is None else next(given)
            elif node.op == "output":
                return self._output(node, outermost=operands is None)
            elif node.op == "call_function":
                self.values[node] = self._call(node, graph)
        return None

    def _placeholder(self, node: Node) -> Answer:
        shape = getattr(node.meta.get("val"), "shape", None)
        if shape is None:
            return None
        name = self._program.tensors.get(node.name)
        if name is not None:
            axes = self.axes_of(name)
            # Masks are of parameters: buffers keep their values at cut units.
            dirty = frozenset(factor for axis in axes for factor in axis if name in self._buffers)
            return self._numbered(Value(axes, dirty=dirty), ())
        value = Value([new_axis(int(size)) for size in shape], dynamic=node.name not in self._program.constants)
        why = "is an axis of the model's inputs" if value.dynamic else "belongs to a constant, no parameter or buffer"
        self.freeze(value, Reason(why))
        return self._numbered(value, ())

    def axes_of(self, name: str) -> list[Axis]:
        """Return the axes of a parameter or buffer; tensors that share memory share axes."""
        if name not in self.tensors:
            tensor = self._actual[name]
            twin = next((other for other in self.tensors if _same_memory(tensor, self._actual[other])), None)
            self.tensors[name] = self.tensors[twin] if twin else [new_axis(size) for size in tensor.shape]
        return self.tensors[name]

    def _output(self, node: Node, *, outermost: bool) -> Answer:
        found = self._read(node.args[0])
        if outermost:
            for value in _values_in(found):
                self.freeze(value, Reason("is an axis of the model's outputs"))
        return tuple(_values_in(found))

    def _call(self, node: Node, graph: GraphModule) -> Answer:
        name = operation_name(node)
        if name == "getitem":
            source, place = self._read(node.args[0]), node.args[1]
            return source[place] if isinstance(source, tuple) and isinstance(place, int) else None
        nested = _nested(graph, node, name)
        if nested is not None:
            return self._run(nested[0], [self._read(arg) for arg in node.args[nested[1] :]])
        call = Call(self, node, name)
        if not call.shapes:
            return None
        before = len(self.costs)
        answer = call.run()
        for value in _values_in(answer):
            self._numbered(value, call.values, weighs=len(self.costs) > before)
        self.shapes.append((name, call.module, [value.axes for value in _values_in(answer)]))
        if name.endswith("_") and isinstance(node.args[0], Node):
            self.values[node.args[0]] = answer
        return answer

    def _numbered(self, value: Value, sources: Iterable[Value], *, weighs: bool = False) -> Value:
        self._count += 1
        value.seen = 1 << self._count
        for source in sources:
            value.seen |= source.seen
            value.dynamic = value.dynamic or source.dynamic
            value.depth = max(value.depth, source.depth + weighs)
        return value

    def turn_of(self, module: str, name: str) -> int:
        """Count the calls of an operation by a module, from 0."""
        self._turns[module, name] = self._turns.get((module, name), -1) + 1
        return self._turns[module, name]

    def _read(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self.values.get(argument)
        if isinstance(argument, tuple | list):
            return [self._read(item) for item in argument]
        return argument

    @staticmethod
    def freeze(value: Value, reason: Reason) -> None:
        """Freeze every axis of a value."""
        for axis in value.axes:
            freeze(axis, reason)


class Call:
    """One operation of the program with its arguments by name; tensors are `Value`s."""

    def __init__(self, walk: Walk, node: Node, name: str) -> None:
        self.walk, self.node, self.name = walk, node, name.rstrip("_") if not name.startswith("__") else name
        self.module = module_of(node)
        self.arguments = self._bind()
        self.values = list(_values_in(list(self.arguments.values())))
        self.shapes = _shapes(node.meta.get("val"))
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
        return rule(self)

    def refuse(self, why: str, axes: Sequence[Axis] | None = None) -> Answer:
        """Freeze `axes` (every axis of the inputs by default) and return results that are frozen."""
        reason = self.reason(why)
        for axis in axes if axes is not None else [axis for value in self.values for axis in value.axes]:
            freeze(axis, reason)
        results = [Value([new_axis(size) for size in shape]) for shape in self.shapes]
        for result in results:
            Walk.freeze(result, reason)
        many = isinstance(self.node.meta.get("val"), tuple | list)
        return tuple(results) if many else results[0]

    def reason(self, why: str) -> Reason:
        """Return a reason that names this operation and its module."""
        return Reason(why, f"{self.name} in {self.module or 'the model'}")

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


def shapes_of(program: Program) -> list[tuple[str, str, list[list[int]]]]:
    """Return each operation of a program in the order of a walk: its name, its module and the sizes of its results."""
    return list(_shapes_of(program.graph))


def _shapes_of(graph: GraphModule) -> Iterator[tuple[str, str, list[list[int]]]]:
    for node in graph.graph.nodes:
        name = operation_name(node) if node.op == "call_function" else "getitem"
        nested = _nested(graph, node, name)
        if nested is not None:
            yield from _shapes_of(nested[0])
        elif name != "getitem" and (shapes := _shapes(node.meta.get("val"))):
            yield name, module_of(node), shapes


def _nested(graph: GraphModule, node: Node, name: str) -> tuple[GraphModule, int] | None:
    """Return the graph that an operation wraps, and the place of its first operand."""
    for place, arg in enumerate(node.args if name.startswith("wrap_with_") else ()):
        if isinstance(arg, Node) and arg.op == "get_attr":
            return getattr(graph, str(arg.target)), place + 1
    return None


def _values_in(found: Any) -> Iterator[Value]:
    if isinstance(found, Value):
        yield found
    elif isinstance(found, tuple | list):
        for item in found:
            yield from _values_in(item)


def _shapes(value: Any) -> list[list[int]]:
    if isinstance(value, tuple | list):
        return [shape for item in value for shape in _shapes(item)]
    return [[int(size) for size in value.shape]] if hasattr(value, "shape") else []


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dim() > 0 and a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape
