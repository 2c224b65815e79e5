"""Which layers read what another layer gives, channel by channel: found in a record of what a model computes.

A producer's channel can be divided by any positive number, and multiplied back in all that read it, if nothing between
them mixes channels or bends values. Names of modules play no part.
"""

from collections import Counter
from collections.abc import Iterator

from torch import nn

from lightning_opt.forward import Inputs
from lightning_opt.quantization.calls import Call, CallGraph, Run, record_calls
from lightning_opt.quantization.improvement import Refused
from lightning_opt.quantization.layers.base import handler, refusal
from lightning_opt.quantization.layerwise import shared_weights
from lightning_opt.quantization.rescaling import Neighbours, check, is_norm

# Positively homogeneous, one channel at a time, whatever else they do to shapes and positions.
_PASSING = frozenset(
    {
        *("relu", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mean", "sum"),
        *("adaptive_avg_pool3d", "interpolate", "upsample", "dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("flatten", "reshape", "view", "unflatten", "transpose", "permute", "movedim", "swapaxes", "contiguous"),
        *("squeeze", "unsqueeze", "to", "float", "type_as", "clone", "expand", "T", "mT", "t", "alpha_dropout"),
    }
)
_KINDS = ("linear", "convolution")
_ATTENTION = "scaled_dot_product_attention"


def neighbours(model: nn.Module, inputs: Inputs) -> tuple[tuple[Neighbours, ...], tuple[Refused, ...]]:
    """Find producers and readers in a float model, in the order in which they are called.

    Each find is tried out: with the channels halved and doubled at random, and undone in the readers, all of these must
    give what they gave.

    Args:
        model: A float model; it runs once, and once more for each producer.
        inputs: One batch.

    Returns:
        What was found, and the producers whose channels something else reads.
    """
    search = _Search(model, record_calls(model, inputs))
    found: list[Neighbours] = []
    refused: list[Refused] = []
    for run in search.producers():
        if any(run.path == group.norm for group in found):
            continue
        result = search.around(run)
        if isinstance(result, Neighbours):
            result = check(model, result, inputs) or result
        if isinstance(result, Refused) and result not in refused:
            refused.append(result)
        elif isinstance(result, Neighbours):
            found.append(result)
    return tuple(found), tuple(refused)


class _Search:
    def __init__(self, model: nn.Module, graph: CallGraph) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.times = Counter(run.path for run in graph.runs)
        self.shared = shared_weights(model)
        self.layers = [run for run in graph.runs if self.is_layer(run)]
        inside = {number for run in self.layers for number in range(run.start, run.end)}
        self.readers: dict[int, list[Run | Call]] = {}
        for run in self.layers:
            for value in dict.fromkeys(run.given):
                if value is not None:
                    self.readers.setdefault(value, []).append(run)
        for call in graph.calls:
            if call.number not in inside:
                for value in dict.fromkeys(call.inputs):
                    self.readers.setdefault(value, []).append(call)
        self.answers = {value for value in graph.runs[0].returned if value is not None}

    def is_layer(self, run: Run) -> bool:
        """Return whether one run of a module is seen as a whole: a layer with a weight, or a norm."""
        module = self.modules[run.path]
        return is_norm(module) or handler(module) is not None

    def producers(self) -> Iterator[Run]:
        """Yield runs of what has a parameter for each of its output channels."""
        for run in self.layers:
            kind = handler(self.modules[run.path])
            if is_norm(self.modules[run.path]) or (kind is not None and kind.name in _KINDS):
                yield run

    def around(self, run: Run) -> Neighbours | Refused | None:
        """Return who reads what a run gives; None where no layer does."""
        value = run.returned[0] if run.returned else None
        if value is None:
            return None
        norm, value = self._behind_norm(run, value)
        readers: list[str] = []
        reasons: list[str] = []
        self._follow(value, readers, reasons)
        reasons += [why for path in (run.path, norm, *readers) if path and (why := self._is_its_own(path))]
        if not readers:
            return None
        if reasons:
            return Refused(path=run.path, why=reasons[0])
        return Neighbours(producer=run.path, norm=norm, readers=tuple(dict.fromkeys(readers)))

    def _behind_norm(self, run: Run, value: int) -> tuple[str | None, int]:
        """Step over a batch norm that alone reads a layer's output."""
        behind = self.readers.get(value, [])
        if is_norm(self.modules[run.path]) or len(behind) != 1 or not isinstance(behind[0], Run):
            return None, value
        module, after = self.modules[behind[0].path], behind[0].returned
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or value in self.answers or after[0] is None:
            return None, value
        return behind[0].path, after[0]

    def _follow(self, value: int, readers: list[str], reasons: list[str]) -> None:
        """Collect the layers that read a value, and what else becomes of it."""
        if value in self.answers:
            reasons.append("the model returns its output")
        for reader in self.readers.get(value, []):
            if isinstance(reader, Run):
                kind = handler(self.modules[reader.path])
                if kind is not None and kind.name in _KINDS and reader.given[:1] == (value,):
                    readers.append(reader.path)
                else:
                    name = type(self.modules[reader.path]).__name__
                    reasons.append(f"its output is also read by {reader.path}, a {name}")
            elif self._passes(reader, value):
                for output in reader.outputs:
                    if output != value:  # a function such as dropout may hand back what it is given
                        self._follow(output, readers, reasons)
            else:
                reasons.append(f"its output is also read by {reader.function} in {self._place(reader)}")

    def _place(self, call: Call) -> str:
        return self.graph.path_of(call) or "the model"

    def _is_its_own(self, path: str) -> str | None:
        """Say why the weights of a layer or norm cannot be changed for this one place; None if they can."""
        if self.times[path] != 1:
            return f"{path} is called {self.times[path]} times"
        why = None if is_norm(self.modules[path]) else refusal(self.modules[path])
        if why is not None:
            return f"{path} cannot be changed: {why}"
        if any(id(parameter) in self.shared for parameter in self.modules[path].parameters()):
            return f"{path} shares its weight with another layer"
        return None

    def _passes(self, call: Call, value: int) -> bool:
        if call.function == _ATTENTION:
            return call.inputs[2:3] == (value,) and value not in call.inputs[:2]
        if call.function in ("getitem", "chunk", "split", "unbind"):
            return False
        return call.function in _PASSING and call.inputs == (value,)
