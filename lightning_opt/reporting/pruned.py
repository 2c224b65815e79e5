"""Read the `pruning` part of a record: which model is the dense one, and how much faster and smaller the pruned is."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_opt.reporting.ratios import engine_label

Record = Mapping[str, Any]
# Interleaved medians on a shared machine do not tell smaller differences apart.
RESOLVED = 1.05
# From here on "fewer" is worth saying: 1 % of the parameters.
LEAST = 1.01
# Shares of the dense model's quality: up to the first a loss is small, beyond the second pruning went too far.
SMALL_LOSS, LARGE_LOSS = 0.01, 0.10
FORMS = {
    "dense": "dense, as it is",
    "bitmask": "bit-mask, fp32 values",
    "bitmask_fp16": "bit-mask, fp16 values",
    "compressed": "bit-mask, deflated",
}


def dense_name(record: Record) -> str | None:
    """Return the name of the model that the pruned one is set against: the one that its latencies were taken with."""
    named = (record.get("pruning") or {}).get("reference")
    return next((name for name in (named, "baseline", "dense") if name and name in record["models"]), None)


def batches(record: Record) -> list[int]:
    """List the batch sizes at which both models were timed."""
    return sorted({row["batch"] for row in _rows(record)})


def fastest(record: Record, batch: int) -> dict[str, Any] | None:
    """Set the dense model in its fastest engine against the pruned one in its own, at one batch size.

    Returns:
        `{"ratio", "dense_ms", "dense_engine", "pruned_ms", "pruned_engine"}`; None where nothing was timed.
    """
    rows = [row for row in _rows(record) if row["batch"] == batch]
    if not rows:
        return None
    best: dict[str, Any] = {}
    for name in ("dense", "pruned"):
        row = min(rows, key=lambda row: row[f"{name}_ms"])
        best |= {f"{name}_ms": row[f"{name}_ms"], f"{name}_engine": engine_label(row)}
    return {"ratio": best["dense_ms"] / best["pruned_ms"], **best}


def is_faster(record: Record) -> bool | None:
    """Tell whether pruning gained speed at any batch size, fastest engine against fastest; None if not timed."""
    found = [fastest(record, batch) for batch in batches(record)]
    return any(row["ratio"] >= RESOLVED for row in found if row) if found else None


def smallest_form(record: Record) -> tuple[str, int, int] | None:
    """Return (form, its bytes, bytes of the dense file before) of the smallest form that keeps every fp32 value."""
    sizes = (record.get("pruning") or {}).get("size_bytes") or {}
    known = [(sizes[form], form) for form in ("dense", "bitmask", "compressed") if sizes.get(form)]
    if not known or not sizes.get("before"):
        return None
    size, form = min(known)
    return form, size, sizes["before"]


def _rows(record: Record) -> Sequence[Mapping[str, Any]]:
    return (record.get("pruning") or {}).get("latency") or ()
