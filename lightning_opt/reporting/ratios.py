"""Compare the student with the teacher and with the student trained alone: ratios, or the reason why there is none."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning_opt.reporting import text

Model = Mapping[str, Any]
_EAGER = "torch eager"


def comparison(
    models: Mapping[str, Model], *, higher_is_better: bool = True, deployed: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Work out the record's `comparison` from its `models`.

    Ratios are reference / student, so that above 1 the student is smaller or faster. The reference is the teacher or,
    where there is none, the baseline. Differences in quality are positive where the first named is the better one,
    whatever the direction of the metric.

    Args:
        models: The record's models: any of "teacher", "baseline" (the student trained alone), "student".
        higher_is_better: Direction of the main metric, the first in `quality`.
        deployed: The record's deployed formats; their latencies count as engines of the student.

    Returns:
        params_ratio, params_nonzero_ratio, size_ratio, flops_ratio, memory_ratio, latency_ratio and throughput_ratio
        per batch, quality_gap, quality_kept, baseline_gain, gap_closure = (student - baseline) / (teacher - baseline),
        speedup; each null with an entry in `reasons` where it can not be said.
    """
    result: dict[str, Any] = {"reasons": {}}
    student = models.get("student")
    if student is None:
        return result
    name, reference = _reference(models)
    result |= _quality(models, higher_is_better, result["reasons"])
    if reference is None:
        return result
    _ratios(result, reference, student)
    result["speedup"] = _speedups(name, reference, student, deployed) or None
    if result["speedup"] is None:
        result["reasons"]["speedup"] = f"no latency of student and {name} at the same batch size"
    return result


def _reference(models: Mapping[str, Model]) -> tuple[str, Model | None]:
    # "dense": the shapes before pruning, untrained, where there is no control; "float": before quantization
    order = ("teacher", "baseline", "dense", "float")
    return next(((name, models[name]) for name in order if name in models), ("teacher", None))


def _ratios(result: dict[str, Any], reference: Model, student: Model) -> None:
    reasons = result["reasons"]
    pairs = {"params": "params", "params_nonzero": "params_nonzero", "size": "size_bytes", "flops": "flops"}
    for name, measure in (pairs | {"memory": "peak_memory_bytes"}).items():
        over, under = reference.get(measure), student.get(measure)
        result[f"{name}_ratio"] = over / under if over and under else None
        if not (over and under):
            reasons[f"{name}_ratio"] = _why(measure, reference, student)
    for name, measure, key in (("latency", "latency_ms", "p50"), ("throughput", "throughput_per_s", "value")):
        values = list(_per_batch(reference.get(measure), student.get(measure), key, invert=name == "throughput"))
        result[f"{name}_ratio"] = values or None
        if not values:
            reasons[f"{name}_ratio"] = _why(measure, reference, student)


def _why(measure: str, *models: Model) -> str:
    said = [model.get("reasons", {}).get(measure) for model in models if not model.get(measure)]
    return next((reason for reason in said if reason), f"{measure} is not known, or zero, for both models")


def _per_batch(over: Any, under: Any, key: str, *, invert: bool) -> Iterator[dict[str, Any]]:
    student = {row["batch"]: row[key] for row in under or () if row[key]}
    for row in over or ():
        if row[key] and row["batch"] in student:
            ratio = row[key] / student[row["batch"]]
            yield {"batch": row["batch"], "value": 1 / ratio if invert else ratio}


def main_metric(models: Mapping[str, Model]) -> str | None:
    """Name the task's main metric: the first in the quality of the student, or of any model that has one."""
    for model in (models.get("student"), *models.values()):
        if model and model.get("quality"):
            return next(iter(model["quality"]))
    return None


def _quality(models: Mapping[str, Model], higher_is_better: bool, reasons: dict[str, str]) -> dict[str, Any]:
    metric = main_metric(models)
    values = {name: (model.get("quality") or {}).get(metric) for name, model in models.items()}
    teacher, baseline, student = (values.get(name) for name in ("teacher", "baseline", "student"))
    sign = 1.0 if higher_is_better else -1.0

    def minus(left: float | None, right: float | None) -> float | None:
        return None if left is None or right is None else sign * (left - right)

    gap, gain, room = minus(teacher, student), minus(student, baseline), minus(teacher, baseline)
    kept = student / teacher if higher_is_better and teacher and student is not None and teacher > 0 else None
    closure = gain / room if gain is not None and room is not None and room > 0 else None
    missing = [name for name in ("teacher", "baseline", "student") if values.get(name) is None]
    absent = f"no {metric or 'quality'} of the {' and the '.join(missing)}"
    no_room = "the teacher is not better than the student alone, so there is no gap to close"
    result = {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "quality_gap": gap,
        "quality_kept": kept,
        "baseline_gain": gain,
        "gap_closure": closure,
    }
    why = {name: absent for name, value in result.items() if value is None}
    if not missing:
        why |= {"quality_kept": "a share says nothing for this metric", "gap_closure": no_room}
    reasons |= {name: reason for name, reason in why.items() if result[name] is None}
    return result


def engines(model: Model) -> list[dict[str, Any]]:
    """List every engine in which a model's latency was measured: its own runtime first, then its `engines`.

    Returns:
        Dictionaries with `engine`, `dtype`, `dense`, `threads` and `latency_ms`.
    """
    own = {"latency_ms": model.get("latency_ms"), **_runtime_fields(model.get("runtime"))}
    return [own, *({"dtype": "fp32", "dense": True, "threads": None} | dict(each) for each in model.get("engines", ()))]


def _runtime_fields(runtime: Any) -> dict[str, Any]:
    fields = dict(runtime) if isinstance(runtime, Mapping) else {"engine": runtime or _EAGER}
    return {"engine": fields["engine"], "dtype": fields.get("dtype") or "fp32", "dense": True} | {
        "threads": fields.get("threads")
    }


def _fastest(choices: Sequence[Mapping[str, Any]], batch: int, keep: Callable[[Any], bool]) -> tuple[float, str] | None:
    times = [
        (row["p50"], engine_label(engine))
        for engine in choices
        if keep(engine)
        for row in engine.get("latency_ms") or ()
        if row["batch"] == batch and row["p50"]
    ]
    return min(times, default=None)


def engine_label(engine: Mapping[str, Any]) -> str:
    """Name an engine and its number format, such as `ONNX Runtime bf16`."""
    name, dtype = str(engine["engine"]), text.short_dtype(engine.get("dtype") or "fp32")
    return name if dtype == "fp32" or dtype in name else f"{name} {dtype}"


def _dense(dtype: str) -> Callable[[Any], bool]:
    return lambda engine: engine.get("dense", True) and text.short_dtype(engine["dtype"]) == dtype


def _is_eager(engine: Mapping[str, Any]) -> bool:
    return "eager" in str(engine["engine"]).lower() and text.short_dtype(engine["dtype"]) == "fp32"


def _speedups(
    name: str, reference: Model, student: Model, deployed: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Set the student's fastest engine against the reference in torch eager and in its best dense engines."""
    slow, fast = engines(reference), engines(student)
    fast += [{"latency_ms": each.get("latency_ms"), **_deployed_engine(each)} for each in deployed]
    batches = sorted({row["batch"] for engine in slow for row in engine.get("latency_ms") or ()})
    rows = []
    for batch in batches:
        best = _fastest(fast, batch, lambda engine: True)
        if best is None:
            continue
        row: dict[str, Any] = {"batch": batch, "engine": best[1], "reference": name, "reasons": {}}
        choices = {"torch_eager": _is_eager, "best_dense_fp32": _dense("fp32"), "best_dense_bf16": _dense("bf16")}
        for key, keep in choices.items():
            against = _fastest(slow, batch, keep)
            row[f"over_{key}"] = against[0] / best[0] if against else None
            if against is None:
                row["reasons"][f"over_{key}"] = f"not measured for the {name} at this batch size"
            elif key != "torch_eager":
                row[f"{key}_engine"] = against[1]
        rows.append(row)
    return rows


def _deployed_engine(each: Mapping[str, Any]) -> dict[str, Any]:
    runtime = each.get("runtime") or str(each.get("format", "?"))
    few_bits = {"dtype": each["precision"], "dense": False} if each.get("precision") not in (None, "fp32") else {}
    return _runtime_fields(runtime) | {"dense": True} | few_bits
