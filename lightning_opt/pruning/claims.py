"""Say in plain sentences what pruning gained, from numbers of the same run; without a number nothing is said of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_opt.pruning.recognise import is_n_of_m

Summary = Mapping[str, Any]
# Interleaved medians on a shared machine do not tell smaller differences apart.
RESOLVED = 1.05
_SHORT = {"float32": "", "bfloat16": " bf16", "float16": " fp16"}


def claims(summary: Summary) -> list[str]:
    """Return one sentence each on what is gone, on speed, on what would give speed, and on size.

    Args:
        summary: From `pruning_summary`: its `kind`, `kinds`, `totals`, `latency`, `size_bytes`.
    """
    said = [_removed(summary), *_speed(summary), _size(summary)]
    return [sentence for sentence in said if sentence]


def _removed(summary: Summary) -> str:
    totals = summary["totals"]
    before, params, nonzero = totals["params_before"], totals["params"], totals["nonzero"]
    if not summary["kinds"]:
        return f"Nothing was pruned: all {before:,} parameters are there and {_share(nonzero, params)} are not zero."
    parts = []
    if params < before:
        words = f"{before:,} parameters became {params:,} ({before / params:.2f}× fewer)"
        if totals["flops"] and totals["flops_before"]:
            ratio = totals["flops_before"] / totals["flops"]
            words += f", FLOPs {_count(totals['flops_before'])} became {_count(totals['flops'])} ({ratio:.2f}× fewer)"
        parts.append(words)
    zeros = [row for row in summary["kinds"] if row["kind"] != "structured"]
    if zeros:
        listed = ", ".join(f"{row['kind']} in {row['layers']} layer{'s' * (row['layers'] != 1)}" for row in zeros)
        parts.append(f"{_share(params - nonzero, params)} of the {params:,} parameters are zero ({listed})")
    return _sentence("; ".join(parts))


def _speed(summary: Summary) -> list[str]:
    rows = summary["latency"]
    if not rows:
        return ["No latency of both models was measured in this run, so nothing is said about speed."]
    if not summary["kinds"]:
        return []
    kinds = [row["kind"] for row in summary["kinds"]]
    shrunk, zeros = "structured" in kinds, [kind for kind in kinds if kind != "structured"]
    batches = sorted({row["batch"] for row in rows})
    measured = [_at_batch(rows, batch) for batch in batches]
    said = [_shrunk(summary, rows, measured) if shrunk else _zeros(zeros, rows, measured)]
    if shrunk and zeros:
        said.append(f"The zeros that are left ({', '.join(zeros)}) were timed together with the smaller shapes.")
    if "latency_quality" in summary["reasons"]:
        said.append(
            "The machine was busy while this was timed: small differences mean nothing; time it on a quiet one."
        )
    slow = _best(rows) < RESOLVED
    return said + ([_what_would(zeros)] if zeros and (slow or shrunk) else [])


def _zeros(zeros: Sequence[str], rows: Sequence[Summary], measured: Sequence[str]) -> str:
    """Judge zeros in unchanged shapes: dense kernels multiply them like any other number, and the times show it."""
    kind, times = " and ".join(zeros[:2]), f"Measured, dense / pruned: {'; '.join(measured)}."
    if _best(rows) >= RESOLVED:
        return f"The shapes are unchanged, zeros are {kind}. {times}"
    if max(row["ratio"] for row in rows) >= RESOLVED:
        return (
            f"The zeros ({kind}) gain in some engine, but with each model in its fastest engine they give no speed "
            f"({_best(rows):.2f}×). {times}"
        )
    return (
        f"The zeros ({kind}) give no speed on this machine: the shapes are unchanged and dense kernels multiply zeros "
        f"like any number. {times}"
    )


def _shrunk(summary: Summary, rows: Sequence[Summary], measured: Sequence[str]) -> str:
    totals = summary["totals"]
    words = f"The smaller shapes run, dense / pruned: {'; '.join(measured)}"
    best = _best(rows)
    quiet = "latency_quality" not in summary["reasons"]  # a share of a busy machine's ratio would say nothing
    if quiet and totals["flops"] and totals["flops_before"]:
        ideal = totals["flops_before"] / totals["flops"]
        words += f". The FLOPs ratio is {ideal:.2f}×, of which the best engine realises {100 * best / ideal:.0f} %"
    if best < RESOLVED:
        words += ". No engine became faster: at this size something else than these operations takes the time"
    return _sentence(words)


def _what_would(zeros: Sequence[str]) -> str:
    """Name what turns zeros into speed; nothing here is a promise of how much."""
    if zeros[0] == "rows and columns":
        return "These are whole channels that were only set to zero: removing them (a pruner with shrink_at) is faster."
    words = "For speed on a CPU remove whole channels, heads or hidden units (pruner=channels)"
    if any(is_n_of_m(kind) for kind in zeros):
        return f"{words}; N:M needs a GPU with sparse tensor cores, and only 2:4 at that."
    return f"{words}; zeros like these make the file smaller, see the sizes."


def _at_batch(rows: Sequence[Summary], batch: int) -> str:
    listed = [
        f"{row['ratio']:.2f}× in {row['engine']}{_dtype(row['engine'], row['dtype'])}"
        for row in rows
        if row["batch"] == batch
    ]
    return f"batch {batch}: {', '.join(listed)}"


def _dtype(engine: str, dtype: str) -> str:
    short = _SHORT.get(dtype, f" {dtype}")
    return "" if short.strip() in engine else short


def _best(rows: Sequence[Summary]) -> float:
    """Return the ratio of the fastest dense to the fastest pruned time, at the batch size where it is largest.

    The engine may differ between the two: a gain over a slow engine alone is none.
    """
    gains = []
    for batch in {row["batch"] for row in rows}:
        mine = [row for row in rows if row["batch"] == batch]
        gains.append(min(row["dense_ms"] for row in mine) / min(row["pruned_ms"] for row in mine))
    return float(max(gains))


def _size(summary: Summary) -> str:
    sizes = summary["size_bytes"]
    before, names = sizes["before"], {"dense": "dense", "bitmask": "bit-mask", "bitmask_fp16": "bit-mask with fp16"}
    names["compressed"] = "bit-mask deflated"
    known = [f"{names[key]} {_bytes(sizes[key])} ({sizes[key] / before:.2f})" for key in names if sizes.get(key)]
    return f"On disk, as shares of the {_bytes(before)} before: {', '.join(known)}." if before and known else ""


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _count(value: float) -> str:
    return _scaled(value, ("", " k", " M", " G", " T"))


def _bytes(value: float) -> str:
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{units[power]}"
