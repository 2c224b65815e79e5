"""From what a model computes to where its quantizers are: the plan, as an edit of the recipe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_opt.quantization.calls import CallGraph
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.layers.base import handler, refusal
from lightning_opt.quantization.layers.plan import LayerPlan
from lightning_opt.quantization.placement_graph import CASTS, MOVES, Steps
from lightning_opt.quantization.placement_places import LAYER_INPUT, LAYER_OUTPUT, Place, choose_places
from lightning_opt.quantization.placement_rules import Layer, Want, find_wants, fold_norms
from lightning_opt.quantization.placement_tied import Product, WeightReads
from lightning_opt.quantization.scheme import LayerScheme, Scheme
from lightning_opt.quantization.sites import ALONE, CHILD, TIMES

_NO_PRODUCTS = MOVES | CASTS | {"add", "sub", "mul", "div", "cat", "stack", "layer_norm", "rms_norm", "where", "lerp"}


@dataclass(frozen=True)
class Refusal:
    """A module that stays in float although the scheme asks for it.

    Attributes:
        path: Its full name.
        why: The reason, one clause.
    """

    path: str
    why: str


@dataclass(frozen=True)
class Placement:
    """The plan, with what it was made from.

    Attributes:
        edit: The edit that inserts the quantizers.
        refused: What stays in float because it cannot be quantized.
        steps: The record, as placement reads it.
        layers: The layers that are quantized, by their full name.
        places: The values that each place rounds.
        names: Full name of the quantizer of each place.
    """

    edit: QuantizeEdit
    refused: tuple[Refusal, ...]
    steps: Steps
    layers: Mapping[str, Layer]
    places: Mapping[Place, Sequence[Want]]
    names: Mapping[Place, str]


def plan(graph: CallGraph, model: nn.Module, scheme: Scheme) -> tuple[QuantizeEdit, tuple[Refusal, ...]]:
    """Decide what is quantized where.

    Args:
        graph: The record of one forward of `model`, from `record_calls`.
        model: The model; it is only read.
        scheme: What to quantize and how.

    Returns:
        The edit that inserts the quantizers, and what it leaves in float because it cannot be quantized.
    """
    placement = place(graph, model, scheme)
    return placement.edit, placement.refused


def place(graph: CallGraph, model: nn.Module, scheme: Scheme) -> Placement:
    """Decide what is quantized where; as `plan`, with all that is needed to check it."""
    modules = dict(model.named_modules())
    reads = WeightReads(graph, modules)
    layers, refused = _find_layers(graph, modules, scheme, reads.refused)
    steps = Steps(graph, layers)
    norms = {name: module for name, module in modules.items() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    fold_norms(steps, layers, norms)
    wants = find_wants(steps, layers, _attention(scheme))
    places, left = choose_places(steps, layers, modules, wants)
    refused += [Refusal(_reader(want), "what it reads is made where it cannot be caught") for want in left]
    products = {Place(p.owner, "linear", p.index): p for p in reads.products if p.table in layers}
    for spot, product in products.items():
        places[spot] = _of_product(product, steps, wants, scheme)
    sites = {spot: _site(graph, layers, places, spot) for spot in places if not spot.is_at_a_layer}
    for spot, product in products.items():
        sites[spot][0] += f"{TIMES}{product.weight_of}{'' if places[spot] else ALONE}"
    owners = sorted({place.path for place in sites})
    edit = QuantizeEdit(
        {path: _layer_plan(layer, places).to_dict() for path, layer in layers.items()},
        {path: sorted((site for spot, site in sites.items() if spot.path == path), key=_order) for path in owners},
        scheme.to_dict(),
    )
    names = {spot: _name(spot, sites.get(spot), is_product=spot in products) for spot in places}
    return Placement(edit, tuple(refused), steps, layers, places, names)


def _attention(scheme: Scheme) -> LayerScheme | None:
    is_asked = scheme.attention and scheme.needs_calibration
    return scheme.layer("", nn.Linear(1, 1, device="meta")) if is_asked else None


def _order(site: list[Any]) -> tuple[str, int]:
    return site[0], site[1]


def _of_product(product: Product, steps: Steps, wants: Mapping[int, Want], scheme: Scheme) -> list[Want]:
    """Return what a product outside of layers reads, if that is to be rounded for it."""
    asked = scheme.layer(product.owner, nn.Linear(1, 1, device="meta"))
    step = next(step for step in steps.steps if step.call is product.call)
    root = steps.root(product.call.inputs[0])
    if asked is None or asked.activation is None or root in wants:
        return []
    return [Want(root, asked, readers=[step])]


def _name(place: Place, site: list[Any] | None, *, is_product: bool) -> str:
    if site is None:
        return f"{place.path}.{'input' if place.function == LAYER_INPUT else 'output'}_quantizer".strip(".")
    own = f"{place.path}.{CHILD}.{place.function}_{site[1]}".strip(".")
    return f"{own}.input_quantizer" if is_product else own


def _find_layers(
    graph: CallGraph, modules: Mapping[str, nn.Module], scheme: Scheme, foreign: Mapping[str, str]
) -> tuple[dict[str, Layer], list[Refusal]]:
    found: dict[str, Layer] = {}
    refused: list[Refusal] = []
    multiplies = _multiplying(graph)
    for path, module in modules.items():
        asked = scheme.layer(path, module)
        is_known = handler(module) is not None
        if asked is None or not (is_known or path in multiplies):
            continue
        why = (
            refusal(module)
            or foreign.get(path)
            or (None if graph.runs_of(path) else "it is not called with these inputs")
        )
        if why is None:
            found[path] = Layer(path, module, asked)
        else:
            refused.append(Refusal(path, why))
    return found, refused


def _multiplying(graph: CallGraph) -> set[str]:
    """Return the modules that hold matrices which some function multiplies with."""
    found: set[str] = set()
    for call in graph.calls:
        for value in (graph.values[value] for value in call.inputs):
            if value.source == "parameter" and len(value.shape) > 1 and call.function not in _NO_PRODUCTS:
                found.add(value.name.rpartition(".")[0])
    return found


def _layer_plan(layer: Layer, places: Mapping[Place, list[Want]]) -> LayerPlan:
    scheme = layer.scheme
    given, made = (places.get(Place(layer.path, where)) for where in (LAYER_INPUT, LAYER_OUTPUT))
    asked = [*(given or ()), *(made or ())]
    activation: LayerScheme = asked[0].scheme if asked else scheme
    is_dynamic = scheme.dynamic and not layer.is_convolution
    dynamic = scheme.activation if is_dynamic else None
    return LayerPlan(
        weight=scheme.weight,
        input=given[0].grid if given else dynamic,
        output=made[0].grid if made else None,
        batch_norm=layer.norm,
        learnable=scheme.learnable,
        clip=scheme.clip,
        dynamic=is_dynamic,
        weight_observer=scheme.weight_observer,
        activation_observer=activation.activation_observer,
    )


def _site(graph: CallGraph, layers: Mapping[str, Layer], places: Mapping[Place, list[Want]], place: Place) -> list[Any]:
    index = place.index
    if place.is_in_a_mode:
        owners = {other.path for other in places if other.is_in_a_mode}
        index = _index_in_mode(graph, place, owners, layers)
    return [place.function, index, _values(places[place][0]) if places[place] else {"grid": {}}]


def _index_in_mode(graph: CallGraph, place: Place, owners: set[str], layers: Mapping[str, Layer]) -> int:
    """Count the calls of the function that the owner's mode sees: not those in layers and in owners inside."""
    run = graph.runs_of(place.path)[0]
    calls = [call for call in graph.calls[run.start : run.end] if call.function == place.function]
    aside = owners | layers.keys()
    seen = 0
    for call in calls[: place.index]:
        inside = _runs_within(graph, call.run, run.number)
        seen += not any(graph.runs[number].path in aside for number in inside)
    return seen


def _runs_within(graph: CallGraph, run: int, outer: int) -> Iterator[int]:
    for around in graph.around(run):
        if around.number == outer:
            return
        yield around.number


def _values(want: Want) -> dict[str, Any]:
    scheme = want.scheme
    observer = scheme.activation_observer.to_dict()
    flags = {name: True for name in ("learnable", "clip", "dynamic") if getattr(scheme, name)}
    return {"grid": want.grid.to_dict(), "observer": observer, **flags}


def _reader(want: Want) -> str:
    return next((step.layer for step in want.readers if step.layer), "")
