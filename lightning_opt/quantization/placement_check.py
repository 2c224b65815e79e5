"""Whether a model with quantizers does what was planned: run it again, and see which values get rounded where.

A function that changes its argument in place, code that keeps an older reference, a forward that takes another way in
training: none of these can be told from the record of one run, and all of them show here.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.quantization.calls import CallGraph, Run, record_calls
from lightning_opt.quantization.placement import Placement
from lightning_opt.quantization.placement_graph import Step, Steps
from lightning_opt.quantization.placement_places import LAYER_INPUT, Place
from lightning_opt.quantization.placement_rules import Want
from lightning_opt.quantization.quantizer import FakeQuantizer


def check_placement(model: nn.Module, inputs: Inputs, placement: Placement) -> None:
    """Run a model that `placement` was applied to, and compare.

    Raises:
        ConfigError: A value that should be rounded is not, or is rounded twice, or one that should not be is.
    """
    with _marking(model):
        after = record_calls(model, inputs)
    quantizers = {name for name, module in model.named_modules() if isinstance(module, FakeQuantizer)}
    _compare(placement, after, quantizers)


def check_modes(model: nn.Module, inputs: Inputs, placement: Placement) -> None:
    """Compare what the model computes in training with what it computes in eval.

    Raises:
        ConfigError: A module that has quantizers takes another way in training.
    """
    graph = placement.steps.graph
    in_training = record_calls(model, inputs, training=True)
    for place in placement.places:
        before, now = (_counts(found, place) for found in (graph, in_training))
        if before != now:
            what = "runs" if not place.is_in_a_mode else f"calls {place.function}"
            raise ConfigError(
                f"{_named(place.path)} {what} {_times(before)} in eval but {_times(now)} in training, so that its "
                f"values cannot be rounded alike; make both ways the same, or exclude {place.path!r}"
            )


def _counts(graph: CallGraph, place: Place) -> list[int]:
    runs = graph.runs_of(place.path)
    if not place.is_in_a_mode:
        return [len(runs)]
    return [sum(call.function == place.function for call in graph.calls[run.start : run.end]) for run in runs]


def _times(counts: Sequence[int]) -> str:
    return " and ".join(f"{count} times" for count in dict.fromkeys(counts)) or "0 times"


def _named(path: str) -> str:
    return f"module {path!r}" if path else "the model"


@contextlib.contextmanager
def _marking(model: nn.Module) -> Iterator[None]:
    """Make each quantizer of activations return a copy of what it is given, which is a value of its own."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizer) and not name.endswith("weight_quantizer")
    ]
    before = [module.enabled for module in found]
    try:
        for module in found:
            module.enabled = True
            module.forward = _copied  # type: ignore[method-assign]
        yield
    finally:
        for module, enabled in zip(found, before, strict=True):
            module.enabled = enabled
            del module.forward


def _copied(x: Tensor) -> Tensor:
    return x.clone()


def _compare(placement: Placement, after: CallGraph, quantizers: set[str]) -> None:
    before, now = placement.steps, Steps(after, placement.layers, aside=quantizers)
    if [step.name for step in before.steps] != [step.name for step in now.steps]:
        raise ConfigError(
            "the model computes something else each time it runs, so that its values cannot be told apart; quantize a "
            "part of it whose forward is always the same"
        )
    rounded = {run.returned[0]: run for run in after.runs if run.path in quantizers and run.returned}
    expected = _Expected(placement)
    for old, new in zip(before.steps, now.steps, strict=True):
        moved = before.moved(old)
        for value_before, value in zip(old.inputs, new.inputs, strict=True):
            if value_before == moved:
                continue
            found = list(_roundings(now, rounded, value))
            found += [run.path for run in rounded.values() if run.parent == new.run and run.given[0] == value]
            wanted = expected.of(old, before.root(value_before))
            if found != wanted:
                raise _error(before, old, value_before, found, wanted)


def _roundings(steps: Steps, rounded: Mapping[int | None, Run], value: int) -> Iterator[str]:
    """Yield the quantizers that a value went through since it was made."""
    run = rounded.get(steps.root(value))
    while run is not None and run.given[0] is not None:
        yield run.path
        run = rounded.get(steps.root(run.given[0]))


class _Expected:
    """Which quantizers a value should have gone through when a step reads it."""

    def __init__(self, placement: Placement) -> None:
        self.names = placement.names
        self.dynamic = {path for path, plan in placement.edit.plans.items() if plan.dynamic and plan.input is not None}
        self.found: dict[int, list[tuple[Place, Want]]] = {}
        for place, wants in placement.places.items():
            for want in wants:
                self.found.setdefault(want.root, []).append((place, want))

    def of(self, step: Step, root: int) -> list[str]:
        if step.layer in self.dynamic:
            return [f"{step.layer}.input_quantizer".strip(".")]
        return [self.names[place] for place, want in self.found.get(root, ()) if _reads_rounded(step, place, want)]


def _reads_rounded(step: Step, place: Place, want: Want) -> bool:
    if place.function == LAYER_INPUT:
        return step.layer == place.path
    return want.is_made_so or step in want.readers


def _error(steps: Steps, step: Step, value: int, found: list[str], wanted: list[str]) -> ConfigError:
    maker = steps.maker.get(steps.root(value))
    made = f"{maker.name} in {_named(steps.path(maker))}" if maker is not None else "the model's input"
    what = "is not rounded" if not found else f"is rounded by {' and '.join(found)}"
    should = f"should be rounded by {' and '.join(wanted)}" if wanted else "should not be"
    return ConfigError(
        f"what {step.name} in {_named(steps.path(step))} reads (from {made}) {what} but {should}: it is changed in "
        "place or kept elsewhere; write that without in-place functions, or leave the reader out with exclude"
    )
