"""Tell which layers of a model are quantized and how, which are not and why, and what share of the weights that is.

Everything is plain values, read from the model that has the quantizers and from its recipe.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.scheme import LayerScheme, Scheme
from lightning_opt.surgery import Recipe, recipe_of

Summary = dict[str, Any]
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_OWN_CHILDREN = ("weight_quantizer", "output_quantizer", "input_quantizer", "site_quantizers")


def quantization_summary(
    model: nn.Module,
    *,
    recipe: Recipe | None = None,
    refused: Mapping[str, str] | None = None,
    chosen: Sequence[Mapping[str, Any]] = (),
) -> Summary:
    """Describe how a model is quantized.

    Args:
        model: With its quantizers, before its weights became integers.
        recipe: Its structural edits, if they are not kept with it; the scheme is read from them.
        refused: Layers that were asked for and can not be quantized: why, by name.
        chosen: How bits were chosen layer by layer, as `MixedPrecision.table` gives it: `name`, `sensitivity` (what
            the layer costs alone) and `reason` (why it has more bits than were asked for).

    Returns:
        `layers` ([{name, kind, params, weight_bits, activation_bits, dynamic, weight, activation, sensitivity,
        float_reason}], one for each weight of two or more dimensions, bits null where it is float), `totals` {layers,
        quantized, params, params_quantized, share, weight_bits}, `scheme` (plain values or null) and `refused`
        ([{name, reason}]). `totals.weight_bits` is the mean over all parameters, 32 for what is float.
    """
    values = scheme_of(recipe_of(model) if recipe is None else recipe)
    scheme = None if values is None else Scheme.from_dict(values)
    known, by_name = dict(refused or {}), {str(row["name"]): row for row in chosen}
    layers = [_layer(name, module, weight, scheme, known, by_name) for name, module, weight in _weights(model)]
    return {
        "scheme": values,
        "layers": layers,
        "totals": _totals(model, layers),
        "refused": [{"name": name, "reason": reason} for name, reason in known.items()],
    }


def scheme_of(recipe: Recipe | Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the scheme by which a recipe says that a model was quantized; None if it was not."""
    edits = recipe.to_list() if isinstance(recipe, Recipe) else recipe
    return next((dict(edit["scheme"]) for edit in edits if edit["op"] == "quantize" and edit.get("scheme")), None)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield each parameter of two or more dimensions once: under its layer's name, or under its own."""
    seen: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if any(part in _OWN_CHILDREN for part in path.split(".")):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1 and id(weight) not in seen:
                seen.add(id(weight))
                yield path if name == "weight" else f"{path}.{name}".lstrip("."), module, weight


def _layer(
    name: str,
    module: nn.Module,
    weight: Tensor,
    scheme: Scheme | None,
    refused: Mapping[str, str],
    chosen: Mapping[str, Mapping[str, Any]],
) -> Summary:
    quantizer = getattr(module, "weight_quantizer", None) if getattr(module, "weight", None) is weight else None
    grid: Grid | None = getattr(quantizer, "grid", None)
    asked = None if scheme is None else scheme.layer(name, module)
    activation = None if grid is None else _activation(module, asked)
    row = chosen.get(name, {})
    why = refused.get(name) or row.get("reason") or _why_float(module, weight, asked, scheme)
    return {
        "name": name,
        "kind": kind_of(module),
        "params": weight.numel(),
        "weight_bits": None if grid is None else grid.bits,
        "activation_bits": None if activation is None else activation.bits,
        "dynamic": bool(activation is not None and asked is not None and asked.dynamic),
        "weight": None if grid is None else grid_words(grid),
        "activation": None if activation is None else grid_words(activation),
        "sensitivity": row.get("sensitivity"),
        "float_reason": None if grid is not None else why,
    }


def _activation(module: nn.Module, asked: LayerScheme | None) -> Grid | None:
    """Return the grid of what a layer reads: its own, or the scheme's, by which the value's maker quantizes it."""
    own = getattr(getattr(module, "input_quantizer", None), "grid", None)
    if own is not None or isinstance(module, _TABLES):
        return own
    return None if asked is None or asked.dynamic else asked.activation  # found live at the layer itself, or not at all


def _why_float(module: nn.Module, weight: Tensor, asked: LayerScheme | None, scheme: Scheme | None) -> str:
    if getattr(module, "weight", None) is not weight:
        return f"a parameter that {kind_of(module)} uses in a way of its own, and no layer's weight"
    if scheme is not None and (asked is None or asked.weight is None):
        return "the scheme leaves it in float"
    return f"no integer form of {kind_of(module)} is known here, or it was excluded"


def kind_of(module: nn.Module) -> str:
    """Name a layer's own class, whatever class it was swapped to."""
    kinds = (kind for kind in type(module).__mro__ if not kind.__module__.startswith("lightning_opt.quantization"))
    return next(kinds).__name__


def grid_words(grid: Grid) -> str:
    """Name a grid in a few words: `int8 per channel`, `uint8`, `int4 in groups of 32`, `float8_e4m3fn`."""
    name = grid.dtype if grid.is_float else f"{'int' if grid.signed else 'uint'}{grid.bits}"
    if grid.group_size is not None:
        return f"{name} in groups of {grid.group_size}"
    return name if grid.axis is None else f"{name} per channel"


def _totals(model: nn.Module, layers: Sequence[Mapping[str, Any]]) -> Summary:
    """Count parameters; steps that are learned belong to the quantizers and are no weights of the model."""
    params = sum(
        weight.numel() for name, weight in model.named_parameters() if not set(name.split(".")) & set(_OWN_CHILDREN)
    )
    known = [row for row in layers if row["weight_bits"] is not None]
    quantized = sum(row["params"] for row in known)
    bits = sum(row["params"] * row["weight_bits"] for row in known) + 32 * (params - quantized)
    return {
        "layers": len(layers),
        "quantized": len(known),
        "params": params,
        "params_quantized": quantized,
        "share": quantized / params if params else None,
        "weight_bits": bits / params if params else None,
    }
