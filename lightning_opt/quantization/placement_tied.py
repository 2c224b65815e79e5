"""Products with the weight of an embedding table outside of it: `linear(x, self.embedding.weight)`, a tied head."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_opt.quantization.calls import Call, CallGraph


@dataclass(frozen=True)
class Product:
    """One call that multiplies with a table.

    Attributes:
        call: The call of `linear`.
        table: Full name of the table.
        owner: Full name of the module whose forward catches the call; it holds the table.
        index: Which call of `linear` it is within a forward of the owner, layers included.
    """

    call: Call
    table: str
    owner: str
    index: int

    @property
    def weight_of(self) -> str:
        """The table's name within its owner."""
        return self.table.removeprefix(f"{self.owner}." if self.owner else "")


class WeightReads:
    """Which weights are read by other code than a layer's own forward.

    Args:
        graph: The record.
        modules: All modules by their full names.
    """

    def __init__(self, graph: CallGraph, modules: Mapping[str, nn.Module]) -> None:
        self.graph, self.modules = graph, modules
        self.products: list[Product] = []
        self.refused: dict[str, str] = {}
        sharing = _sharing(modules)
        for call in graph.calls:
            for place, value in enumerate(call.inputs):
                paths = sharing.get(graph.values[value].name, [])
                if paths and graph.path_of(call) not in paths:
                    self._note(call, place, paths)
        self.products = [product for product in self.products if product.table not in self.refused]

    def _note(self, call: Call, place: int, paths: Iterable[str]) -> None:
        product = self._product(call, paths) if call.function == "linear" and place == 1 else None
        if product is not None:
            self.products.append(product)
            return
        where = self.graph.path_of(call) or "the model"
        self.refused.update(dict.fromkeys(paths, f"its weight is also read by {call.function} in {where}"))

    def _product(self, call: Call, paths: Iterable[str]) -> Product | None:
        table = next((path for path in paths if isinstance(self.modules[path], nn.Embedding)), None)
        if table is None:
            return None
        for run in self.graph.around(call.run):
            if table.startswith(f"{run.path}." if run.path else ""):
                calls = [c for c in self.graph.calls[run.start : run.end] if c.function == "linear"]
                return Product(call, table, run.path, calls.index(call))
        return None


def _sharing(modules: Mapping[str, nn.Module]) -> Mapping[str, list[str]]:
    """Return, for the name of each weight, the modules that hold it."""
    holders: dict[int, list[str]] = {}
    for path, weight in _weights(modules):
        holders.setdefault(id(weight), []).append(path)
    return {f"{path}.weight".strip("."): holders[id(weight)] for path, weight in _weights(modules)}


def _weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            yield path, weight
