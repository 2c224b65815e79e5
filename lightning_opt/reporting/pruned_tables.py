"""Lay out what pruning did: each layer, size on disk in its four forms, and each engine with both models."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_opt.reporting import pruned, text
from lightning_opt.reporting.names import model_name
from lightning_opt.reporting.ratios import engine_label
from lightning_opt.reporting.tables import Table

Record = Mapping[str, Any]
MOST_LAYERS = 40
_SAME = "as before"


def totals(record: Record) -> Table | None:
    """Set parameters and operations before and after side by side, where the other tables compare with a teacher."""
    found = (record.get("pruning") or {}).get("totals")
    if not found or "teacher" not in record["models"]:
        return None  # without a teacher the models' own table says the same
    rows = [
        ["parameters", text.count(found["params_before"]), text.count(found["params"]), *_times(found, "params")],
        ["not zero", text.count(found["params_before"]), text.count(found["nonzero"]), *_times(found, "nonzero")],
        ["FLOPs per sample", text.count(found["flops_before"]), text.count(found["flops"]), *_times(found, "flops")],
    ]
    return Table(["", "before", "after", "before / after"], rows, strong=2)


def _times(found: Mapping[str, Any], after: str) -> list[str]:
    before = found["flops_before" if after == "flops" else "params_before"]
    return [text.times(before / found[after]) if before and found[after] else text.DASH]


def shown_layers(record: Record) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Split the layers into the largest, in the model's order, and the rest."""
    layers = (record.get("pruning") or {}).get("layers") or []
    order = sorted(range(len(layers)), key=lambda place: -layers[place]["params_before"])
    largest = set(order[:MOST_LAYERS])
    return [row for place, row in enumerate(layers) if place in largest], [
        row for place, row in enumerate(layers) if place not in largest
    ]


def layers(record: Record) -> Table | None:
    """List each weight: its shape before and after, what is left of it, how its zeros lie, and its operations.

    Columns that say the same of every layer (no shape changed, no zeros) are left out.
    """
    shown, rest = shown_layers(record)
    if not shown:
        return None
    rows = [_layer(row) for row in shown]
    if rest:
        rows.append(_summed(rest))
    header = ["weight", "shape before", "shape", "parameters", "not zero", "zeros", "they lie", "left", "FLOPs"]
    dull = {2: {_SAME, ""}, 4: set(), 5: {"0.0 %", ""}, 6: {""}}
    kept = [place for place in range(len(header)) if place not in dull or {row[place] for row in rows} - dull[place]]
    if 5 not in kept:  # without zeros the count of what is not zero repeats the parameters
        kept = [place for place in kept if place != 4]
    return Table([header[place] for place in kept], [[row[place] for place in kept] for row in rows])


def _layer(row: Mapping[str, Any]) -> list[str]:
    shape = _SAME if row["shape"] == row["original_shape"] else "gone" if row["shape"] is None else _shape(row["shape"])
    flops = text.count(row["flops"])
    if row["flops"] is not None and row["flops_before"] is not None and row["flops"] != row["flops_before"]:
        flops = f"{text.count(row['flops_before'])} to {flops}"
    return [
        text.plain(row["name"].removesuffix(".weight"), limit=48),
        _shape(row["original_shape"]),
        shape,
        text.count(row["params"]),
        text.count(row["nonzero"]),
        _percent(row["sparsity"]),
        "" if row["zeros"] == "none" else text.plain(row["zeros"], limit=24),
        _percent(row["kept"]),
        flops,
    ]


def _summed(rest: Sequence[Mapping[str, Any]]) -> list[str]:
    before, params, nonzero = (sum(row[key] for row in rest) for key in ("params_before", "params", "nonzero"))
    left = _percent(nonzero / before if before else None)
    zeros = _percent(1 - nonzero / params if params else None)
    return [f"{len(rest)} smaller ones", "", "", text.count(params), text.count(nonzero), zeros, "", left, ""]


def _shape(sides: Sequence[int]) -> str:
    return "×".join(str(side) for side in sides)


def _percent(share: float | None) -> str:
    return text.DASH if share is None else f"{100 * share:.1f} %"


def sizes(record: Record) -> Table | None:
    """List the bytes of the weights in each form, and as a share of the dense file before pruning."""
    found = (record.get("pruning") or {}).get("size_bytes") or {}
    known = [(words, found[form]) for form, words in pruned.FORMS.items() if found.get(form)]
    if not known:
        return None
    before = found.get("before")
    rows = [["before pruning", text.size(before), text.number(1.0)]] if before else []
    rows += [[words, text.size(size), f"{size / before:.3f}" if before else text.DASH] for words, size in known]
    return Table(["weights on disk", "bytes", "of the file before"], rows, strong=1)


def engines(record: Record) -> Table | None:
    """List, for each engine and batch size, the median latency of both models and the ratio."""
    rows = (record.get("pruning") or {}).get("latency")
    if not rows:
        return None
    dense = model_name(record, pruned.dense_name(record) or "dense")
    batches = pruned.batches(record)
    header = ["engine"]
    for batch in batches:
        header += [f"batch {batch}: {dense}", "pruned", "ratio"]
    names = list(dict.fromkeys(engine_label(row) for row in rows))
    return Table(header, [[text.plain(name, limit=40), *_cells(rows, name, batches)] for name in names])


def _cells(rows: Sequence[Mapping[str, Any]], name: str, batches: Sequence[int]) -> list[str]:
    cells = []
    for batch in batches:
        row = next((row for row in rows if row["batch"] == batch and engine_label(row) == name), None)
        if row is None:
            cells += [text.DASH] * 3
        else:
            cells += [text.milliseconds(row["dense_ms"]), text.milliseconds(row["pruned_ms"]), f"{row['ratio']:.2f}×"]
    return cells


def tiles(record: Record) -> list[tuple[str, str]]:
    """Pick up to four large numbers: quality, what is left, speed, size."""
    found = record["pruning"]["totals"]
    made = _quality_tile(record)
    if found["kept"] is not None:
        words = f"of {text.count(found['params_before'])} parameters are left and not zero"
        made.append((_percent(found["kept"]), words))
    for batch in pruned.batches(record)[:1]:
        best = pruned.fastest(record, batch)
        if best:
            times = f"{text.milliseconds(best['dense_ms'])} to {text.milliseconds(best['pruned_ms'])}"
            made.append((f"{best['ratio']:.2f}×", f"as fast at batch {batch}, each in its fastest engine: {times}"))
    small = pruned.smallest_form(record)
    if small:
        form, size, before = small
        how = "" if form == "dense" else f" ({pruned.FORMS[form]})"
        made.append((text.times(before / size), f"smaller on disk: {text.size(before)} to {text.size(size)}{how}"))
    return made


def _quality_tile(record: Record) -> list[tuple[str, str]]:
    metric, models = record["comparison"].get("metric"), record["models"]
    names = ("teacher", "baseline", "student")
    found = {name: (models.get(name, {}).get("quality") or {}).get(metric) for name in names}
    if found["student"] is None:
        return []
    beside = [name for name in names[:2] if found[name] is not None]
    others = [f"{model_name(record, name)} {text.quality(found[name])}" for name in beside]
    words = text.plain(metric, limit=24)
    return [(text.quality(found["student"]), f"{words} ({', '.join(others)})" if others else words)]
