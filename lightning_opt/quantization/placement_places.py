"""Where each value is rounded: once, so that all who should read the rounded value do, and nobody else has to.

In order of preference: by the layer that makes the value; at what a module returns or is given; by the only layer that
reads it; and last by catching a function's result in the middle of a forward. Each place also rounds other values when
its module runs more than once, so that a place is taken only if those are to be rounded there too.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from lightning_opt.quantization.calls import Run
from lightning_opt.quantization.placement_graph import DROPOUTS, Step, Steps
from lightning_opt.quantization.placement_names import NAME_OF
from lightning_opt.quantization.placement_rules import Layer, Want

LAYER_OUTPUT, LAYER_INPUT = "layer output", "layer input"
_SITE_NAMES = frozenset(NAME_OF.values())


@dataclass(frozen=True)
class Place:
    """Somewhere a quantizer can be.

    Attributes:
        path: Full name of the layer or owner.
        function: `LAYER_OUTPUT` or `LAYER_INPUT` of a layer; at an owner "input", "output" or a function.
        index: Which argument or returned item, or which call of the function within the owner's forward.
    """

    path: str
    function: str
    index: int = 0

    @property
    def is_at_a_layer(self) -> bool:
        """Whether a layer does it itself."""
        return self.function in (LAYER_OUTPUT, LAYER_INPUT)

    @property
    def is_in_a_mode(self) -> bool:
        """Whether the value is caught in the middle of the owner's forward."""
        return not self.is_at_a_layer and self.function not in ("input", "output")


def choose_places(
    steps: Steps, layers: Mapping[str, Layer], modules: Mapping[str, nn.Module], wants: Mapping[int, Want]
) -> tuple[dict[Place, list[Want]], list[Want]]:
    """Return the values that each place rounds, and those for which there is no place."""
    finder = _Finder(steps, layers, modules, wants)
    banned: set[Place] = set()
    while True:
        chosen: dict[Place, list[Want]] = {}
        left: list[Want] = []
        for want in wants.values():
            places = [place for place in finder.places(want) if not banned.intersection(place)]
            for place in places[0] if places else ():
                chosen.setdefault(place, []).append(want)
            if not places:
                left.append(want)
        wrong = {place for place, there in chosen.items() if not finder.is_right(place, there)}
        if not wrong:
            return chosen, left
        banned |= wrong


class _Finder:
    def __init__(
        self,
        steps: Steps,
        layers: Mapping[str, Layer],
        modules: Mapping[str, nn.Module],
        wants: Mapping[int, Want],
    ) -> None:
        self.steps, self.layers, self.modules, self.wants = steps, layers, modules, wants
        self.graph = steps.graph
        self.norms = {layer.norm: layer for layer in layers.values() if layer.norm is not None}

    def places(self, want: Want) -> Iterator[tuple[Place, ...]]:
        """Yield the places where a value can be rounded, best first; more than one where each reader does it."""
        readers = [step for step, _ in self.steps.readers.get(want.root, ())]
        integer = set(want.readers)
        everyone = want.is_made_so or (set(readers) <= integer and want.root not in self.steps.returned)
        sole = self._at_sole_reader(want, readers)
        if want.is_joined:
            yield from self._in_mode(want)  # which rounds what is joined as well, for an engine
        if everyone:
            yield from self._at_maker(want)
            if not want.is_made_so:
                yield from sole
                yield from self._at_dropout(want, readers)
            yield from self._at_returning(want, readers)
            yield from sole
            yield from self._at_dropout(want, readers)
            yield from self._in_mode(want)
        may_be_each = not want.is_made_so or (set(readers) <= integer and want.root not in self.steps.returned)
        if may_be_each and len(integer) == 1:
            yield from self._at_readers(integer)
        yield from self._at_taking(want, readers, integer)
        if may_be_each:
            yield from self._at_readers(integer)

    def is_right(self, place: Place, there: Iterable[Want]) -> bool:
        """Return whether a place rounds just the values that are to be rounded there, each by the same grid."""
        wants = list(there)
        covered = self._covered(place)
        return covered == {want.root for want in wants} and len({want.grid for want in wants}) == 1

    def _covered(self, place: Place) -> set[int]:
        found: set[int] = set()
        runs = self.graph.runs_of(place.path)
        for run in runs:
            if place.is_in_a_mode:
                value = self._call_value(run, place)
            elif place.function in (LAYER_INPUT, "input"):
                value = run.given[place.index] if place.index < len(run.given) else None
            else:
                value = self._returned(run, place)
            if value is not None:
                found.add(self.steps.root(value))
        return found

    def _returned(self, run: Run, place: Place) -> int | None:
        layer = self.layers.get(place.path) if place.function == LAYER_OUTPUT else None
        if layer is not None and layer.norm is not None:
            run = self.graph.runs_of(layer.norm)[0]
        return run.returned[place.index] if place.index < len(run.returned) else None

    def _call_value(self, run: Run, place: Place) -> int | None:
        calls = [call for call in self.graph.calls[run.start : run.end] if call.function == place.function]
        return calls[place.index].outputs[0] if place.index < len(calls) else None

    def _maker(self, root: int) -> Step | None:
        return self.steps.maker.get(root)

    def _at_maker(self, want: Want) -> Iterator[tuple[Place, ...]]:
        step = self._maker(want.root)
        if step is None:
            return
        layer = self.layers.get(step.layer)
        if layer is None and step.function == "batch_norm":
            layer = self.norms.get(self.steps.path(step))
        if layer is not None and step.outputs and step.outputs[0] == want.root:
            yield (Place(layer.path, LAYER_OUTPUT),)

    def _at_sole_reader(self, want: Want, readers: list[Step]) -> list[tuple[Place, ...]]:
        read = self.steps.readers.get(want.root, ())
        if len(readers) != 1 or readers[0] not in want.readers or not readers[0].layer:
            return []
        if want.root in self.steps.returned or self.steps.drops(read[0][1]):
            return []
        return [(Place(readers[0].layer, LAYER_INPUT),)]

    def _at_readers(self, integer: set[Step]) -> Iterator[tuple[Place, ...]]:
        if integer and all(step.layer for step in integer):
            yield tuple(dict.fromkeys(Place(step.layer, LAYER_INPUT) for step in sorted(integer, key=_number)))

    def _at_returning(self, want: Want, readers: list[Step]) -> Iterator[tuple[Place, ...]]:
        """Yield modules that return the value, from the inside out, if all reading is done behind them."""
        step = self._maker(want.root)
        for run in self.graph.around(step.run) if step is not None else ():
            place = self._returns(run, want.root)
            if place is not None and all(reader.at >= run.end for reader in readers):
                yield (place,)

    def _returns(self, run: Run, root: int) -> Place | None:
        indices = [i for i, value in enumerate(run.returned) if value is not None and self.steps.root(value) == root]
        if len(indices) != 1 or not self._can_own(run.path) or not self._once_in_parent(run):
            return None
        value = run.returned[indices[0]]
        reads = [value_read for _, value_read in self.steps.readers.get(root, ())]
        returned = [alias for alias in self.graph.runs[0].returned if alias is not None]
        reads += [alias for alias in returned if self.steps.root(alias) == root]
        if not all(value in self.steps.chain(alias) for alias in reads):
            return None
        return Place(run.path, "output", indices[0])

    def _at_taking(self, want: Want, readers: list[Step], integer: set[Step]) -> Iterator[tuple[Place, ...]]:
        """Yield modules that are given the value and in which those who need it rounded read it, and nobody else."""
        if not integer:
            return
        steps = sorted(integer, key=_number)
        around = self.graph.runs[steps[0].run].parent or 0 if steps[0].layer else steps[0].run
        for run in self.graph.around(around):
            inside = {step for step in readers if run.start <= step.at < run.end}
            if inside == integer and self._can_own(run.path) and self._once_in_parent(run):
                yield from self._given(run, want, integer)

    def _given(self, run: Run, want: Want, integer: set[Step]) -> Iterator[tuple[Place, ...]]:
        reads = [value for step, value in self.steps.readers[want.root] if step in integer]
        for index, value in enumerate(run.given):
            if value is not None and all(value in self.steps.chain(read) for read in reads):
                yield (Place(run.path, "input", index),)

    def _at_dropout(self, want: Want, readers: list[Step]) -> Iterator[tuple[Place, ...]]:
        """Yield the dropout modules behind which all reading is done: rounding comes before dropping."""
        for run in self.graph.runs:
            calls = self.graph.calls[run.start : run.end]
            is_dropout = len(calls) == 1 and calls[0].function in DROPOUTS and calls[0].run == run.number
            given = run.given[0] if run.given else None
            if not is_dropout or given is None or self.steps.root(given) != want.root:
                continue
            if self._can_own(run.path) and all(step.at >= run.end for step in readers):
                yield (Place(run.path, "input"),)

    def _in_mode(self, want: Want) -> Iterator[tuple[Place, ...]]:
        step = self._maker(want.root)
        if step is None or step.call is None or step.function not in _SITE_NAMES or step.outputs[0] != want.root:
            return
        for run in self.graph.around(step.run):
            if not self._can_own(run.path) or (self._is_leaf(run.path) and not self._once_in_parent(run)):
                continue
            same = [call for call in self.graph.calls[run.start : run.end] if call.function == step.function]
            yield (Place(run.path, step.function, same.index(step.call)),)
            return

    def _can_own(self, path: str) -> bool:
        module = self.modules.get(path)
        if module is None or path in self.layers or path in self.norms:
            return False
        return "forward" not in vars(module) and not isinstance(module, torch.jit.ScriptModule)

    def _is_leaf(self, path: str) -> bool:
        return not self.modules[path]._modules and not self.modules[path]._parameters

    def _once_in_parent(self, run: Run) -> bool:
        """Return whether a module runs once in each forward of the one module that calls it."""
        return self._single.get(run.path, False)

    @cached_property
    def _single(self) -> dict[str, bool]:
        parents: dict[str, list[int | None]] = {}
        for run in self.graph.runs:
            parents.setdefault(run.path, []).append(run.parent)
        return {path: self._are_single(found) for path, found in parents.items()}

    def _are_single(self, parents: list[int | None]) -> bool:
        paths = {self.graph.runs[parent].path for parent in parents if parent is not None}
        return len(parents) == len(set(parents)) and len(paths) <= 1


def _number(step: Step) -> int:
    return step.number
