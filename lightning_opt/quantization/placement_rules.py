"""Which values get a grid, so that engines run every convolution and linear layer in integers.

Found out on small graphs with ONNX Runtime 1.32 and OpenVINO 2026.4, in the form of quantize-dequantize pairs:

- A convolution runs in integers if its input comes from a pair and its output, after an optional ReLU, goes into one,
  and into nothing else. So the output of every convolution has a grid, also where a SiLU, GELU or hard swish follows.
- A batch norm is part of the convolution; so is a clip from 0 up, since the grid cannot leave its range.
- A linear layer needs a grid on its input alone.
- A sum, product or concatenation runs in integers if all operands and the result have grids. Worth it between
  convolutions; the residual stream of a transformer stays in float.
- Average pooling and resizing need a grid on their result, which is read by the next layer and so has one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers.batch_norm import why_not_folded
from lightning_opt.quantization.placement_graph import Step, Steps
from lightning_opt.quantization.scheme import LayerScheme

JOINS = frozenset({"add", "mul", "cat"})
PRODUCTS = {"scaled_dot_product_attention": 3, "matmul": 2, "bmm": 2}
"""Products of computed values, as in attention, and how many factors they have."""
_ELEMENTWISE = frozenset(
    {
        *("relu", "relu6", "hardtanh", "clamp", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "silu", "mish"),
        *("hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "batch_norm"),
    }
)
_POOLS = frozenset(
    {
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
        *("adaptive_avg_pool3d", "mean", "interpolate", "upsample"),
    }
)


@dataclass
class Layer:
    """A layer that is quantized.

    Attributes:
        path: Its full name.
        module: The layer.
        scheme: How.
        norm: Full name of the batch norm that is folded into it.
    """

    path: str
    module: nn.Module
    scheme: LayerScheme
    norm: str | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, plain or transposed."""
        return isinstance(self.module, nn.modules.conv._ConvNd)

    @property
    def reads_integers(self) -> bool:
        """Whether what it reads is quantized by a grid of one tensor."""
        return self.scheme.activation is not None and not self.scheme.dynamic


@dataclass
class Want:
    """A value that gets a grid.

    Attributes:
        root: The value.
        scheme: Whose grid, observer and so on it gets.
        is_made_so: Everyone reads the rounded value; otherwise only `readers` have to.
        is_joined: It is a concatenation, and what it joins takes its grid.
        readers: The steps that run in integers.
    """

    root: int
    scheme: LayerScheme
    is_made_so: bool = False
    is_joined: bool = False
    readers: list[Step] = field(default_factory=list)

    @property
    def grid(self) -> Grid:
        """The grid."""
        assert self.scheme.activation is not None
        return self.scheme.activation


def find_wants(steps: Steps, layers: Mapping[str, Layer], attention: LayerScheme | None = None) -> dict[int, Want]:
    """Return the values that get a grid, by their root.

    Args:
        steps: The record.
        layers: What is quantized.
        attention: How the factors of products of two computed values are quantized; None: they stay in float.
    """
    return _Rules(steps, layers).find(attention)


def fold_norms(steps: Steps, layers: Mapping[str, Layer], norms: Mapping[str, nn.Module]) -> None:
    """Note at each layer the batch norm that directly follows it, and nothing else reads what the layer gives."""
    runs = {path: len(steps.graph.runs_of(path)) for path in (*layers, *norms)}
    for step in steps.steps:
        layer = layers.get(step.layer)
        reader = steps.sole_reader(step.outputs[0]) if layer and step.outputs else None
        if layer is None or reader is None or reader.function != "batch_norm":
            continue
        path = steps.path(reader)
        if path in norms and runs[path] == runs[layer.path] == 1 and why_not_folded(norms[path], layer.module) is None:
            layer.norm = path


class _Rules:
    def __init__(self, steps: Steps, layers: Mapping[str, Layer]) -> None:
        self.steps, self.layers = steps, layers
        self.wants: dict[int, Want] = {}
        self.of_convolutions: dict[int, LayerScheme] = {}
        self._spread()
        self.joins = self._useful_joins()

    def find(self, attention: LayerScheme | None) -> dict[int, Want]:
        for step in self.steps.steps:
            layer = self.layers.get(step.layer)
            if layer is not None and layer.reads_integers:
                self._layer(step, layer)
            elif attention is not None and step.function in PRODUCTS:
                self._product(step, attention)
        for step, scheme in self.joins.items():
            self._join(step, scheme)
        for root in self._only_joined():
            del self.wants[root]
        return self.wants

    def _layer(self, step: Step, layer: Layer) -> None:
        if step.inputs and self.steps.graph.values[step.inputs[0]].is_floating:
            self._read(step, layer)
        if layer.is_convolution and step.outputs:
            self._want(self.end(step), layer.scheme).is_made_so = True

    def _read(self, step: Step, layer: Layer) -> None:
        """Give a value the finest grid that the layers which read it ask for."""
        want = self._want(step.inputs[0], layer.scheme)
        grid = layer.scheme.activation
        is_first = not any(reader.layer for reader in want.readers)  # a product asks for no grid of its own
        if grid is not None and (is_first or grid.bits > want.grid.bits):
            want.scheme = layer.scheme
        want.readers.append(step)

    def _product(self, step: Step, scheme: LayerScheme) -> None:
        values = self.steps.graph.values
        factors = list(dict.fromkeys(step.inputs[: PRODUCTS[step.function]]))
        computed = [value for value in factors if values[value].is_floating and values[value].source == "call"]
        for value in computed if len(computed) == len(factors) else ():
            self._want(value, scheme).readers.append(step)

    def _join(self, step: Step, scheme: LayerScheme) -> None:
        for value in self._operands(step):
            want = self._want(value, scheme)
            want.is_made_so = True
            want.readers.append(step)
        self._want(self.end(step), scheme).is_made_so = True

    def _want(self, value: int, scheme: LayerScheme) -> Want:
        root = self.steps.root(value)
        return self.wants.setdefault(root, Want(root, scheme))

    def end(self, step: Step) -> int:
        """Return the value in which a step's work ends: after its batch norm, and after a ReLU that it can do."""
        value = step.outputs[0]
        layer = self.layers.get(step.layer)
        reader = self.steps.sole_reader(value)
        if layer is not None and layer.norm is not None and reader is not None:
            value = reader.outputs[0]
            reader = self.steps.sole_reader(value)
        return reader.outputs[0] if reader is not None and _cuts_at_zero(reader) else value

    def _spread(self) -> None:
        """Find the values that convolutions give, and what is made of such values alone."""
        for step in self.steps.steps:
            scheme = self._spread_to(step)
            if scheme is not None:
                for value in step.outputs:
                    self.of_convolutions[self.steps.root(value)] = scheme

    def _spread_to(self, step: Step) -> LayerScheme | None:
        layer = self.layers.get(step.layer)
        read = [self.of_convolutions.get(self.steps.root(value)) for value in self._operands(step)]
        if layer is not None:
            is_part = layer.reads_integers and (layer.is_convolution or (bool(read) and read[0] is not None))
            return layer.scheme if is_part else None
        if not read or any(scheme is None for scheme in read):
            return None
        if step.function in _ELEMENTWISE | _POOLS or (step.function in JOINS and len(step.inputs) > 1):
            return read[0]
        return None

    def _operands(self, step: Step) -> list[int]:
        """Return the values that a step reads, without the parameters and buffers of an activation or a norm."""
        values = self.steps.graph.values
        own = {"parameter", "buffer"} if step.function not in JOINS else set()
        return [value for value in dict.fromkeys(step.inputs) if values[value].source not in own]

    def _useful_joins(self) -> dict[Step, LayerScheme]:
        """Return the sums, products and concatenations of such values whose result is read in integers."""
        found: dict[Step, LayerScheme] = {}
        for step in reversed(self.steps.steps):
            scheme = self.of_convolutions.get(self.steps.root(step.outputs[0])) if step.outputs else None
            if step.function not in JOINS or scheme is None or not _has_two(step):
                continue
            if self._leads_to_integers(self.end(step), found, through=_POOLS if step.function == "cat" else None):
                found[step] = scheme
        return dict(reversed(found.items()))

    def _leads_to_integers(self, value: int, joins: Mapping[Step, LayerScheme], through: frozenset[str] | None) -> bool:
        for step, _ in self.steps.readers.get(self.steps.root(value), ()):
            layer = self.layers.get(step.layer)
            if step in joins or (layer is not None and layer.reads_integers):
                return True
            passes = step.function in (_ELEMENTWISE | _POOLS if through is None else through)
            if passes and step.outputs and self._leads_to_integers(step.outputs[0], joins, through):
                return True
        return False

    def _only_joined(self) -> Iterator[int]:
        """Yield the values that are read by one concatenation and by nothing else: they take the grid of its result."""
        for root, want in list(self.wants.items()):
            readers = {step for step, _ in self.steps.readers.get(root, ())}
            if len(readers) == 1 and root not in self.steps.returned:
                (step,) = readers
                result = self.wants.get(self.end(step)) if step in self.joins and step.function == "cat" else None
                if result is not None and self.end(step) == step.outputs[0] and result.grid == want.grid:
                    result.is_joined = True
                    yield root


def _has_two(step: Step) -> bool:
    return len(set(step.inputs)) > 1 or (step.call is not None and len(step.inputs) > 1)


def _cuts_at_zero(step: Step) -> bool:
    """Return whether a step is a ReLU, or a clip from 0 up, which an engine makes part of the step before."""
    if step.function in ("relu", "relu6"):
        return True
    if step.function not in ("hardtanh", "clamp") or step.call is None or len(step.inputs) != 1:
        return False
    names = ("min_val", "max_val") if step.function == "hardtanh" else ("min", "max")
    args = (*step.call.args[1:], None, None)
    low, high = (step.call.kwargs.get(name, args[place]) for place, name in enumerate(names))
    return low == 0 and (high is None or high > 0)
