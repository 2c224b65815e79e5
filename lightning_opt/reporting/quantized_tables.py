"""Lay out what quantization did: each layer, and each engine with what it takes, gains and answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_opt.reporting import quantized, text
from lightning_opt.reporting.gains import batches_of, file_label, median_ms
from lightning_opt.reporting.names import control_name, model_name
from lightning_opt.reporting.ratios import engine_label, engines
from lightning_opt.reporting.tables import Table

Record = Mapping[str, Any]
MOST_LAYERS = 40


def engine_rows(record: Record) -> list[dict[str, Any]]:
    """List every way to run the float models and the quantized one.

    Returns:
        `{name, label, role, model, part, size_bytes, quality, chosen}`: the engines of the float model, those of the
        control that quality is compared with, the files of few bits; each of these sorted by its latency.
    """
    names = dict.fromkeys((quantized.float_name(record), record["quantization"].get("judged")))
    groups = [_dense_rows(record, name) for name in names if name in record["models"]]
    groups.append([_few_row(record, entry) for entry in quantized.files(record)])
    batch = min(quantized.timed_batches(record), default=1)
    rows = []
    for group in groups:
        rows += sorted(group, key=lambda row: median_ms(row["part"], batch) or float("inf"))
    return [row | {"chosen": _is_chosen(record, row)} for row in rows]


def _dense_rows(record: Record, name: str) -> list[dict[str, Any]]:
    metric, model = record["comparison"].get("metric"), record["models"][name]
    whole = (model.get("quality") or {}).get(metric)
    rows = []
    for engine in engines(model):
        own = (engine.get("quality") or {}).get(metric)
        rows.append(
            {
                "name": f"{model_name(record, name)}, {engine_label(engine)}",
                "label": engine_label(engine),
                "role": "float",
                "model": name,
                "part": engine,
                "size_bytes": model.get("size_bytes"),
                "quality": whole if own is None and text.short_dtype(engine["dtype"]) == "fp32" else own,
            }
        )
    return [row for row in rows if row["part"].get("latency_ms")]


def _few_row(record: Record, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": file_label(entry),
        "label": file_label(entry),
        "role": "quantized",
        "model": "student",
        "part": entry,
        "size_bytes": entry["size_bytes"],
        "quality": (entry["quality"] or {}).get(record["comparison"].get("metric")),
    }


def _is_chosen(record: Record, row: Mapping[str, Any]) -> bool:
    found = record.get("recommendation")
    if not found or found["model"] != row["model"]:
        return False
    if row["role"] == "quantized":
        return bool(found["file"] == row["part"]["file"])
    return file_label({"runtime": found["engine"], "precision": found["precision"]}) == str(row["label"])


def ways(record: Record) -> Table | None:
    """Set every engine of the float model and every file of few bits side by side: latency, size, quality."""
    rows = engine_rows(record)
    batches = sorted({batch for row in rows for batch in batches_of(row["part"])})
    if not rows or not batches:
        return None
    header = ["", *(words for batch in batches for words in (f"batch {batch}: p50", "p95")), "size"]
    header += [text.plain(record["comparison"].get("metric") or "quality", limit=20)]
    return Table(
        header,
        [
            [
                f"{row['name']}{' (recommended)' if row['chosen'] else ''}",
                *(cell for batch in batches for cell in _times(row["part"], batch)),
                text.size(row["size_bytes"]),
                text.quality(row["quality"]),
            ]
            for row in rows
        ],
    )


def _times(part: Mapping[str, Any], batch: int) -> list[str]:
    found = next((row for row in part.get("latency_ms") or () if row["batch"] == batch), None)
    return [text.milliseconds(found[key] if found else None) for key in ("p50", "p95")]


def gains(record: Record) -> Table | None:
    """List what each file of few bits gains over the float model: in torch eager, and in its best fp32 and bf16."""
    entries = [entry for entry in quantized.files(record) if entry.get("gains")]
    if not entries:
        return None
    batches = quantized.timed_batches(record)
    against = {"torch_eager": "over torch eager", "best_fp32": "over best fp32", "best_bf16": "over best bf16"}
    shown = {
        key: words
        for key, words in against.items()
        if any(row[f"over_{key}"] is not None for entry in entries for row in entry["gains"])
    }
    header = ["file", *(f"batch {batch}: {words}" for batch in batches for words in shown.values())]
    rows = [
        [file_label(entry), *(_gain(entry, batch, key) for batch in batches for key in shown), *_parity(entry)]
        for entry in entries
    ]
    header += ["smaller", "same answers", "largest difference", "in steps"]
    if all(row[-1] == text.DASH for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(header, rows)


def _gain(entry: Mapping[str, Any], batch: int, key: str) -> str:
    row = next((row for row in entry["gains"] if row["batch"] == batch), None)
    ratio = row[f"over_{key}"] if row else None
    return text.DASH if ratio is None else f"{ratio:.2f}×"


def _parity(entry: Mapping[str, Any]) -> list[str]:
    agreement = entry["argmax_agreement"]
    return [
        text.times(entry.get("size_ratio")),
        text.DASH if agreement is None else f"{100 * agreement:.2f} %",
        text.number(entry["max_abs_diff"]),
        text.number(entry.get("steps")),
    ]


def rivals(record: Record) -> list[str]:
    """Say which engines the best ones were."""
    said = []
    for row in record["comparison"].get("quantized") or ():
        names = [f"{key} {row[f'best_{key}_engine']}" for key in ("fp32", "bf16") if row.get(f"best_{key}_engine")]
        if names:
            said.append(f"Best of the float model at batch {row['batch']}: {', '.join(names)}.")
        why = (row.get("reasons") or {}).get("over_best_bf16")
        if row["over_best_bf16"] is None and why:
            said.append(f"{why[:1].upper()}{why[1:]}.")
    return [text.plain(words, limit=300) for words in dict.fromkeys(said)]


def shown_layers(record: Record) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Split the layers into the largest, in the model's order, and the rest."""
    rows = record["quantization"]["layers"]
    order = sorted(range(len(rows)), key=lambda place: -rows[place]["params"])
    largest = set(order[:MOST_LAYERS])
    return [row for place, row in enumerate(rows) if place in largest], [
        row for place, row in enumerate(rows) if place not in largest
    ]


def layers(record: Record) -> Table | None:
    """List each weight: its kind, its bits, the bits of what it reads, and why it is in float where it is."""
    shown, rest = shown_layers(record)
    if not shown:
        return None
    rows = [_layer(row) for row in shown]
    if rest:
        rows.append(_summed(rest))
    header = ["weight", "kind", "parameters", "weight", "it reads", "costs alone", "in float because"]
    kept = [
        place for place in range(len(header)) if place < 4 or any(row[place] not in ("", text.DASH) for row in rows)
    ]
    return Table([header[place] for place in kept], [[row[place] for place in kept] for row in rows], prose=True)


def _layer(row: Mapping[str, Any]) -> list[str]:
    reads = row.get("activation") or (None if row["activation_bits"] is None else f"{row['activation_bits']:g} bits")
    cost = row["sensitivity"]
    return [
        text.plain(row["name"], limit=48),
        text.plain(row["kind"], limit=24),
        text.count(row["params"]),
        text.plain(
            row.get("weight") or ("float" if row["weight_bits"] is None else f"{row['weight_bits']:g} bits"), limit=30
        ),
        f"{text.plain(reads, limit=24)}{', live' if row.get('dynamic') else ''}" if reads else "float",
        "" if cost is None else text.number(cost),
        text.plain(row["float_reason"] or "", limit=160),
    ]


def _summed(rest: Sequence[Mapping[str, Any]]) -> list[str]:
    params = sum(row["params"] for row in rest)
    inside = sum(row["weight_bits"] is not None for row in rest)
    return [f"{len(rest)} smaller ones", "", text.count(params), f"{inside} of them quantized", "", "", ""]


def sensitivity(record: Record) -> Table | None:
    """Rank the layers by what each costs alone, the dearest first, with the bits that they got."""
    found = [row for row in record["quantization"]["layers"] if row["sensitivity"] is not None]
    if not found:
        return None
    ranked = sorted(found, key=lambda row: -row["sensitivity"])[:MOST_LAYERS]
    rows = [
        [str(place), text.plain(row["name"], limit=48), text.number(row["sensitivity"]), _bits(row)]
        for place, row in enumerate(ranked, start=1)
    ]
    return Table(["rank", "layer", "costs alone", "bits of its weight"], rows)


def _bits(row: Mapping[str, Any]) -> str:
    return "float" if row["weight_bits"] is None else f"{row['weight_bits']:g}"


def tiles(record: Record) -> list[tuple[str, str]]:
    """Pick up to four large numbers: quality, size, speed at each batch size."""
    made = _quality_tile(record)
    sizes = quantized.sizes(record)
    if sizes:
        words = f"smaller on disk: {text.size(sizes[0])} to {text.size(sizes[1])}"
        made.append((text.times(sizes[0] / sizes[1]), words))
    for row in quantized.speeds(record)[:2]:
        few, dense = text.plain(row["few"], limit=30), text.plain(row["dense"], limit=30)
        name = control_name(record, row["model"])
        words = f"as fast at batch {row['batch']}: {few} against the {name}'s {dense}"
        made.append((f"{row['ratio']:.2f}×", words))
    return made


def _quality_tile(record: Record) -> list[tuple[str, str]]:
    metric, models = record["comparison"].get("metric"), record["models"]
    own = (models["student"]["quality"] or {}).get(metric)
    if own is None:
        return []
    beside = [
        name for name in ("teacher", "baseline", "float") if (models.get(name, {}).get("quality") or {}).get(metric)
    ]
    others = [f"{model_name(record, name)} {text.quality(models[name]['quality'][metric])}" for name in beside]
    words = text.plain(metric, limit=24)
    return [(text.quality(own), f"{words} ({', '.join(others)})" if others else words)]
