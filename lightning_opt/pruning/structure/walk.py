"""The walk along a program, which ties axes together operation by operation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.fx import GraphModule, Node

from lightning_opt.pruning.structure.axes import Axis, Reason, new_axis
from lightning_opt.pruning.structure.calls import Answer, Call, Link, Value, shapes_in, values_in
from lightning_opt.pruning.structure.program import Program, module_of, operation_name

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
            elif node.op == "get_attr" and hasattr(node.meta.get("val"), "shape"):
                self.values[node] = self._placeholder(node)
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
        is_input = node.op == "placeholder" and node.name not in self._program.constants
        value = Value([new_axis(int(size)) for size in shape], dynamic=is_input)
        why = "is an axis of the model's inputs" if value.dynamic else "belongs to a constant, no parameter or buffer"
        value.freeze(Reason(why))
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
            for value in values_in(found):
                value.freeze(Reason("is an axis of the model's outputs"))
        return tuple(values_in(found))

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
        for value in values_in(answer):
            self._numbered(value, call.values, weighs=len(self.costs) > before)
        self.shapes.append((name, call.module, [value.axes for value in values_in(answer)]))
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


def shapes_of(program: Program) -> list[tuple[str, str, list[list[int]]]]:
    """Return each operation of a program in the order of a walk: its name, its module and the sizes of its results."""
    return list(_shapes_of(program.graph))


def _shapes_of(graph: GraphModule) -> Iterator[tuple[str, str, list[list[int]]]]:
    for node in graph.graph.nodes:
        name = operation_name(node) if node.op == "call_function" else "getitem"
        nested = _nested(graph, node, name)
        if nested is not None:
            yield from _shapes_of(nested[0])
        elif name != "getitem" and (shapes := shapes_in(node.meta.get("val"))):
            yield name, module_of(node), shapes


def _nested(graph: GraphModule, node: Node, name: str) -> tuple[GraphModule, int] | None:
    """Return the graph that an operation wraps, and the place of its first operand."""
    for place, arg in enumerate(node.args if name.startswith("wrap_with_") else ()):
        if isinstance(arg, Node) and arg.op == "get_attr":
            return getattr(graph, str(arg.target)), place + 1
    return None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.dim() > 0 and a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape
