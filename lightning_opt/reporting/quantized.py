"""Read the `quantization` part of a record: what it is set against, how large it is, how fast, and what it costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_opt.reporting import text
from lightning_opt.reporting.gains import batches_of, file_label, is_quantized

Record = Mapping[str, Any]
# Shares of the float model's quality: up to the first a loss is small, beyond the second it is too much.
SMALL_LOSS, LARGE_LOSS = 0.005, 0.05
_VNNI = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "i8mm"})


def float_name(record: Record) -> str | None:
    """Return the name of the float model whose engines the files were timed beside."""
    named = (record.get("quantization") or {}).get("reference")
    return next((name for name in (named, "float", "baseline") if name and name in record["models"]), None)


def files(record: Record) -> list[Mapping[str, Any]]:
    """List the deployed files of few bits."""
    return [entry for entry in record["deployed"] if is_quantized(entry)]


def timed_batches(record: Record) -> list[int]:
    """List the batch sizes at which files of few bits were timed."""
    return sorted({batch for entry in files(record) for batch in batches_of(entry)})


def fastest(record: Record, batch: int) -> Mapping[str, Any] | None:
    """Return the row of `comparison.quantized` at one batch size."""
    rows = record["comparison"].get("quantized") or ()
    return next((row for row in rows if row["batch"] == batch), None)


def speeds(record: Record) -> list[dict[str, Any]]:
    """Set few bits against the float model, each in the engine that is the fastest over all batch sizes.

    Returns:
        `{batch, ratio, few, dense, model}`: names of both engines and of the float model; what the recommendation rests
        on where there is one, else the medians.
    """
    found = record.get("recommendation")
    if found:
        own, is_file = _label(found), found["file"] is not None
        return [
            {
                "batch": row["batch"],
                "ratio": row["ratio"] if is_file else 1 / row["ratio"],
                "few": own if is_file else row["over"],
                "dense": row["over"] if is_file else own,
                "model": row.get("over_model", float_name(record)) if is_file else found["model"],
            }
            for row in found.get("batches") or ()
        ]
    rows = record["comparison"].get("quantized") or ()
    best = [(row, over) for row in rows if (over := best_over_float(row))]
    return [
        {"batch": row["batch"], "ratio": over[0], "few": row["engine"], "dense": over[1], "model": row["reference"]}
        for row, over in best
    ]


def _label(found: Mapping[str, Any]) -> str:
    return file_label({"runtime": found["engine"], "precision": found["precision"]})


def best_over_float(row: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return (ratio, engine) against the float model's best engine of any format: the smaller of the two gains."""
    found = [
        (row[f"over_{key}"], row.get(f"{key}_engine", "its best engine"))
        for key in ("best_fp32", "best_bf16")
        if row[f"over_{key}"] is not None
    ]
    return min(found, default=None)


def sizes(record: Record) -> tuple[int, int] | None:
    """Return the bytes of the weights on disk, in float and quantized; None if one is not known."""
    found = record["quantization"].get("size_bytes") or {}
    before, after = found.get("float"), found.get("quantized")
    return (before, after) if before and after else None


def loss_share(record: Record) -> float | None:
    """Return the loss as a share of the float model's quality; None if it is not known."""
    drop, name = record["quantization"].get("quality_drop"), record["quantization"].get("judged")
    metric = record["comparison"].get("metric")
    base = ((record["models"].get(name) or {}).get("quality") or {}).get(metric) if name else None
    return None if drop is None or not base else drop / abs(base)


def scheme_words(record: Record) -> str:
    """Name the bits: `weights 8 bits, activations 8 bits`, as found in the layers; the most common first."""
    layers = [row for row in record["quantization"]["layers"] if row["weight_bits"] is not None]
    weights, activations = (_most_common(layers, key) for key in ("weight_bits", "activation_bits"))
    if not weights:
        return "nothing is quantized"
    live = any(row.get("dynamic") for row in layers)
    said = f"weights {_listed(weights)}"
    return (
        f"{said}, activations {_listed(activations)}{' (ranges found live)' if live else ''}" if activations else said
    )


def _most_common(layers: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    counted: dict[float, int] = {}
    for row in layers:
        if row[key] is not None:
            counted[row[key]] = counted.get(row[key], 0) + row["params"]
    return sorted(counted, key=lambda bits: -counted[bits])


def _listed(bits: Sequence[float]) -> str:
    return f"{' and '.join(f'{each:g}' for each in bits)} bits"


def claims(record: Record) -> list[str]:
    """Say in a few sentences what was quantized, what was not, what engines make of it and what this processor can."""
    found = record["quantization"]
    totals = found["totals"]
    said = []
    if totals["layers"]:
        share = "" if totals["share"] is None else f", {100 * totals['share']:.1f} % of the parameters"
        said.append(
            f"{totals['quantized']} of {totals['layers']} weights are quantized{share}: {scheme_words(record)}."
        )
    refused = [text.plain(row["name"], limit=40) for row in found["refused"]]
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        said.append(f"Left in float because they can not be quantized: {', '.join(refused[:4])}{more}.")
    said += [
        f"{text.plain(engine, limit=30)} runs {row['int8']} of {row['total']} convolutions and products in integers."
        for engine, row in (found.get("fused") or {}).items()
    ]
    return said + _of_processor(record)


def _of_processor(record: Record) -> list[str]:
    there = record["hardware"]["cpu"].get("instructions")
    multiplies = any(row["activation_bits"] is not None for row in record["quantization"]["layers"])
    if not files(record) or not multiplies or there is None or "avx2" not in there or _VNNI & set(there):
        return []
    return [
        "This processor has no instructions for products of 8-bit integers (VNNI): engines add them up in pairs in 16 "
        "bits, which is slower and can saturate. The quality through each engine says what that costs; on a processor "
        "with VNNI the same files are faster."
    ]


def alternatives(record: Record) -> list[str]:
    """Say where another engine is the fastest at one batch size than the one that is recommended."""
    found = record.get("recommendation")
    if not found:
        return []
    chosen = _label(found)
    return [
        f"At batch {row['batch']} alone, {text.plain(row['engine'], limit=40)} is the fastest "
        f"({text.milliseconds(row['ms'])})."
        for row in found.get("by_batch") or ()
        if row["engine"] != chosen
    ]
