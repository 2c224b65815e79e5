"""Set each deployed file against the float model in its engines: torch eager, the best in fp32 and the best in bf16."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_opt.reporting import text
from lightning_opt.reporting.ratios import engine_label, engines

Model = Mapping[str, Any]
Row = dict[str, Any]
_FLOATS = frozenset({"fp32", "bf16", "fp16", "fp64", "float64", "fp32 weights"})
_AGAINST = ("torch_eager", "best_fp32", "best_bf16")


def precision_of(entry: Model) -> str:
    """Name the number format of a deployed file, such as `int8`, `int4 weights` or `fp32`."""
    runtime = entry.get("runtime")
    dtype = runtime.get("dtype") if isinstance(runtime, Mapping) else None
    return text.short_dtype(entry.get("precision") or dtype or "fp32")


def is_quantized(entry: Model) -> bool:
    """Tell whether a deployed file holds fewer bits than a float model."""
    return precision_of(entry) not in _FLOATS


def median_ms(part: Model, batch: int) -> float | None:
    """Return the median latency of a model, engine or deployed file at one batch size; None if it is not known."""
    return next((row["p50"] for row in part.get("latency_ms") or () if row["batch"] == batch), None)


def steady_ms(part: Model, batch: int) -> float | None:
    """Return the 10th percentile in place of the median, which a busy machine disturbs least; else the median."""
    rows = (row for row in part.get("latency_ms") or () if row["batch"] == batch)
    return next((row.get("p10") or row["p50"] for row in rows), None)


def is_noisy(part: Model) -> bool:
    """Tell whether the machine was busy while a model or file was timed."""
    return "latency_quality" in (part.get("reasons") or {})


def batches_of(part: Model) -> list[int]:
    """List the batch sizes at which a model, engine or deployed file was timed."""
    return sorted({row["batch"] for row in part.get("latency_ms") or () if row["p50"]})


def best_engine(model: Model, batch: int, dtype: str | None = None) -> tuple[float, str] | None:
    """Return (median ms, name) of the fastest dense engine of a model, in one number format or in any float one."""
    found = [
        (time, engine_label(engine))
        for engine in engines(model)
        if engine.get("dense", True) and text.short_dtype(engine["dtype"]) in ({dtype} if dtype else _FLOATS)
        if (time := median_ms(engine, batch))
    ]
    return min(found, default=None)


def with_gains(entry: Model, *, name: str, reference: Model) -> dict[str, Any]:
    """Return a deployed file's entry with what it gains over the float model.

    Args:
        entry: One of the record's `deployed`.
        name: Name of the float model in the record's `models`.
        reference: That model, timed in the same interleaved measurement as the file.

    Returns:
        The entry, with `reference`, `size_ratio` and `gains`: for each batch size `over_torch_eager`, `over_best_fp32`
        and `over_best_bf16` with the engines that these were, each null with an entry in its `reasons` where it can not
        be said. Above 1 the file is faster or smaller.
    """
    rows = [_gain(batch, median_ms(entry, batch), name, reference) for batch in batches_of(entry)]
    over, under = reference.get("size_bytes"), entry.get("size_bytes")
    changed: dict[str, Any] = {"reference": name, "size_ratio": over / under if over and under else None, "gains": rows}
    why = {} if changed["size_ratio"] else {"size_ratio": f"no size of the file, or of the {name}"}
    return {**entry, **changed, "reasons": {**(entry.get("reasons") or {}), **why}}


def _gain(batch: int, own: float | None, name: str, reference: Model) -> Row:
    row: Row = {"batch": batch, "reasons": {}}
    for key, find in _ways().items():
        found = find(reference, batch)
        row[f"over_{key}"] = found[0] / own if found and own else None
        if row[f"over_{key}"] is None:
            row["reasons"][f"over_{key}"] = _absent(key, name)
        elif found is not None:
            row[f"{key}_engine"] = found[1]
    return row


def _ways() -> dict[str, Callable[[Model, int], tuple[float, str] | None]]:
    return {
        "torch_eager": _eager,
        "best_fp32": lambda model, batch: best_engine(model, batch, "fp32"),
        "best_bf16": lambda model, batch: best_engine(model, batch, "bf16"),
    }


def _eager(model: Model, batch: int) -> tuple[float, str] | None:
    times = [
        (time, engine_label(engine))
        for engine in engines(model)
        if "eager" in str(engine["engine"]).lower() and text.short_dtype(engine["dtype"]) == "fp32"
        if (time := median_ms(engine, batch))
    ]
    return min(times, default=None)


def _absent(key: str, name: str) -> str:
    if key == "best_bf16":
        return "no bf16 engine ran the float model: this processor may not multiply bf16 in hardware"
    return f"not measured for the {name} at this batch size"


def quantized_rows(deployed: Sequence[Model], reference: str) -> list[Row]:
    """Pick the fastest file of few bits at each batch size, with its gains, as the record's `comparison.quantized`."""
    entries = [entry for entry in deployed if is_quantized(entry)]
    rows = []
    for batch in sorted({batch for entry in entries for batch in batches_of(entry)}):
        timed = [(time, place) for place, entry in enumerate(entries) if (time := median_ms(entry, batch))]
        entry = entries[min(timed)[1]]
        gain = next((row for row in entry.get("gains") or () if row["batch"] == batch), None)
        if gain is not None:
            named = {"format": entry["format"], "engine": file_label(entry), "precision": precision_of(entry)}
            rows.append({**named, "reference": reference, "p50": min(timed)[0], **gain})
    return rows


def file_label(entry: Model) -> str:
    """Name a deployed file by its engine and number format, such as `OpenVINO int8`."""
    runtime = entry.get("runtime")
    engine = (runtime.get("engine") if isinstance(runtime, Mapping) else runtime) or entry.get("format", "?")
    return engine_label({"engine": engine, "dtype": precision_of(entry)})
