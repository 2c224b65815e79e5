"""Set a pruned model beside the one that it was made from: what is gone, where, how, and what that gained.

Everything is plain values, counted from the two models or taken from what was measured in the same run.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_opt.evaluation.flops import Flops, count_flops
from lightning_opt.evaluation.parameters import count_nonzero, count_parameters
from lightning_opt.evaluation.size import safetensors_bytes
from lightning_opt.forward import Inputs
from lightning_opt.pruning.claims import claims
from lightning_opt.pruning.recognise import LEAST_SPARSITY, NONE, UNSTRUCTURED, kind_of_zeros, share_of_zeros
from lightning_opt.pruning.sizes import sizes_on_disk
from lightning_opt.surgery import Recipe, recipe_of, replay

Summary = dict[str, Any]
STRUCTURED = "structured"


def pruning_summary(
    model: nn.Module,
    original: nn.Module,
    *,
    recipe: Recipe | None = None,
    example_inputs: Inputs | None = None,
    dense: Mapping[str, Any] | None = None,
    pruned: Mapping[str, Any] | None = None,
) -> Summary:
    """Describe a pruned model against its original.

    Args:
        model: The pruned one, in eval mode.
        original: The same architecture before pruning; only its shapes count, its weights may be fresh.
        recipe: All structural edits of the model; needed only where they renamed layers (dropped whole layers). What
            `original` has behind it too is left out.
        example_inputs: One batch; without it no FLOPs are counted.
        dense: Measures of the dense model as `evaluation.measure` gives them, for latencies.
        pruned: Measures of the pruned model from the same call.

    Returns:
        `kind` (in a word or two), `kinds` ([{kind, layers, params}]), `layers` ([{name, original_shape, shape, params,
        params_before, nonzero, sparsity, kept, zeros, flops, flops_before}], one a weight matrix or convolution),
        `totals`, `size_bytes` {before, dense, bitmask, bitmask_fp16, compressed}, `latency` ([{engine, dtype, threads,
        batch, dense_ms, pruned_ms, ratio}]), `sentences`, and `reasons` for what is null. `sparsity` is the share of
        zeros in what is there, `kept` the share of the original weights that is there and not zero.
    """
    reasons: dict[str, str] = {}
    counted = _flops(model, original, example_inputs, reasons)
    layers = _layers(model, original, recipe, counted)
    latency = latencies(dense or {}, pruned or {})
    if not latency:
        reasons["latency"] = "no engine ran both models at the same batch size in this run (benchmark=false?)"
    elif any("latency_quality" in (each.get("reasons") or {}) for each in (dense or {}, pruned or {})):
        reasons["latency_quality"] = "the machine was busy while this was timed"
    kinds = _kinds(layers)
    summary: Summary = {
        "kind": " + ".join(row["kind"] for row in kinds[:3]) or NONE,
        "kinds": kinds,
        "layers": layers,
        "totals": _totals(model, original, counted),
        "size_bytes": _sizes(model, original),
        "latency": latency,
        "reasons": reasons,
    }
    return summary | {"sentences": claims(summary)}


def _flops(
    model: nn.Module, original: nn.Module, example_inputs: Inputs | None, reasons: dict[str, str]
) -> tuple[Flops | None, Flops | None]:
    """Count one sample's operations in the original and in the pruned model; zeros count like any other number."""
    if example_inputs is None:
        reasons["flops"] = "no example inputs were given"
        return None, None
    try:
        return count_flops(original, example_inputs), count_flops(model, example_inputs)
    except Exception as error:  # a stranger's forward can fail in any way; the counts of weights stand without it
        reasons["flops"] = f"could not be counted: {type(error).__name__}: {str(error).strip()[:200]}"
        return None, None


def _layers(
    model: nn.Module, original: nn.Module, recipe: Recipe | None, counted: tuple[Flops | None, Flops | None]
) -> list[Summary]:
    """List each weight of two or more dimensions: first those that are there, then those whose layer is gone."""
    before = {name: weight for name, weight in original.named_parameters() if weight.ndim > 1}
    names = _origins(original, recipe)
    rows, found = [], set()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            origin = names.get(name, name)
            found.add(origin)
            rows.append(_layer(name, weight, origin, before.get(origin), counted))
    gone = [_gone(name, weight, counted[0]) for name, weight in before.items() if name not in found]
    return rows + gone


def _origins(original: nn.Module, recipe: Recipe | None) -> dict[str, str]:
    """Map each parameter's name after the recipe to its name before: edits keep the objects, so these tell."""
    rest = Recipe(recipe.edits[len(recipe_of(original)) :]) if recipe else Recipe()
    if not len(rest):
        return {}
    followed = copy.deepcopy(original)
    identity = {id(parameter): name for name, parameter in followed.named_parameters()}
    followed = replay(followed, rest)
    return {name: identity[id(p)] for name, p in followed.named_parameters() if id(p) in identity}


def _layer(
    name: str, weight: Tensor, origin: str, before: Tensor | None, counted: tuple[Flops | None, Flops | None]
) -> Summary:
    nonzero, was = int(weight.detach().count_nonzero()), before if before is not None else weight
    kind = kind_of_zeros(weight)
    # Zeros that the fresh model has too, such as a table's padding row, come from no pruning.
    if kind != NONE and before is not None and before.shape == weight.shape:
        kind = kind if share_of_zeros(weight) - share_of_zeros(before) >= LEAST_SPARSITY else NONE
    return {
        "name": name,
        "original_shape": list(was.shape),
        "shape": list(weight.shape),
        "params_before": was.numel(),
        "params": weight.numel(),
        "nonzero": nonzero,
        "sparsity": 1 - nonzero / weight.numel() if weight.numel() else None,
        "kept": nonzero / was.numel() if was.numel() else None,
        "zeros": kind,
        "flops_before": _of_module(counted[0], origin),
        "flops": _of_module(counted[1], name),
    }


def _gone(name: str, weight: Tensor, counted: Flops | None) -> Summary:
    return {
        "name": name,
        "original_shape": list(weight.shape),
        "shape": None,
        "params_before": weight.numel(),
        "params": 0,
        "nonzero": 0,
        "sparsity": None,
        "kept": 0.0,
        "zeros": NONE,
        "flops_before": _of_module(counted, name),
        "flops": None if counted is None else 0,
    }


def _of_module(counted: Flops | None, parameter: str) -> int | None:
    """Return the operations of the module that owns a parameter; None where the count does not tell them apart."""
    module = parameter.rpartition(".")[0]
    return None if counted is None or not module else counted.by_module.get(module)


def _kinds(layers: Sequence[Summary]) -> list[Summary]:
    """Say how the weights were pruned, over all layers: what was removed first, then zeros by the weights they take."""
    count: Counter[str] = Counter()
    params: Counter[str] = Counter()
    for row in layers:
        lost = row["params_before"] - row["params"]
        if row["original_shape"] != row["shape"]:
            count[STRUCTURED] += 1
            params[STRUCTURED] += lost
        if row["zeros"] != NONE:
            count[row["zeros"]] += 1
            params[row["zeros"]] += row["params"] - row["nonzero"]
    order = sorted(count, key=lambda kind: (kind != STRUCTURED, -params[kind], kind))
    if len(order) > 1 and UNSTRUCTURED in order:  # a few odd layers do not name the whole
        order = [kind for kind in order if kind == STRUCTURED or params[kind] >= 0.02 * sum(params.values())]
    return [{"kind": kind, "layers": count[kind], "params": params[kind]} for kind in order]


def _totals(model: nn.Module, original: nn.Module, counted: tuple[Flops | None, Flops | None]) -> Summary:
    before, params, nonzero = count_parameters(original), count_parameters(model), count_nonzero(model)
    return {
        "params_before": before,
        "params": params,
        "nonzero": nonzero,
        "sparsity": 1 - nonzero / params if params else None,
        "kept": nonzero / before if before else None,
        "flops_before": counted[0].total if counted[0] else None,
        "flops": counted[1].total if counted[1] else None,
    }


def _sizes(model: nn.Module, original: nn.Module) -> Summary:
    """Return the bytes of the weights in each form, and of the dense file before pruning."""
    return {"before": safetensors_bytes(original), **sizes_on_disk(model)}


def latencies(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> list[Summary]:
    """Set the medians of two models side by side, for each engine and batch size at which both were timed.

    Args:
        dense: Measures as `evaluation.measure` gives them.
        pruned: The same of the other model, from the same call: only calls that took turns can be compared.

    Returns:
        Rows with `ratio` = dense / pruned: above 1 the pruned model is faster.
    """
    other = {(row["engine"], row["dtype"], row["batch"]): row for row in _timed(pruned)}
    rows = []
    for row in _timed(dense):
        match = other.get((row["engine"], row["dtype"], row["batch"]))
        if match is not None:
            times = {"dense_ms": row["p50"], "pruned_ms": match["p50"], "ratio": row["p50"] / match["p50"]}
            rows.append({key: row[key] for key in ("engine", "dtype", "threads", "batch")} | times)
    return rows


def _timed(measures: Mapping[str, Any]) -> list[Summary]:
    """List (engine, dtype, threads, batch, p50) of a model, PyTorch eager first."""
    own = dict(measures.get("runtime") or {}) | {"latency_ms": measures.get("latency_ms")}
    return [
        {"engine": each["engine"], "dtype": each.get("dtype") or "float32", "threads": each.get("threads")}
        | {"batch": row["batch"], "p50": row["p50"]}
        for each in (own, *(measures.get("engines") or ()))
        for row in each.get("latency_ms") or ()
        if each.get("engine") and row.get("p50")
    ]
