"""Lay out a record as small tables of text, shared by the HTML report, the Markdown report and the terminal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from lightning_opt.reporting import text
from lightning_opt.reporting.gains import precision_of
from lightning_opt.reporting.names import adjectives, before_name, model_name
from lightning_opt.reporting.record import has_null

Record = Mapping[str, Any]
Reader = Callable[[Any], Any]
_ORDER = ("teacher", "baseline", "dense", "float", "student")
_LABELS = {
    "quality": "quality",
    "params": "parameters",
    "params_nonzero": "non-zero parameters",
    "flops": "FLOPs per sample",
    "size_bytes": "size on disk",
    "latency_ms": "latency",
    "throughput_per_s": "throughput",
    "peak_memory_bytes": "peak memory",
    "energy_j_per_1k": "energy per 1000",
    "cost_per_1m": "cost per million",
    "runtime": "runtime",
    "max_abs_diff": "largest difference",
    "argmax_agreement": "same answers",
    "file": "file",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row.

    Attributes:
        header: Column titles.
        rows: Cells, one list a row.
        strong: Index of the column to stand out, or None.
        prose: Whether the cells are words, which read best from the left, not numbers.
    """

    header: list[str]
    rows: list[list[str]]
    strong: int | None = None
    prose: bool = False


def label(measure: str) -> str:
    """Name a measure for people; `a.b` and foreign names stay."""
    return _LABELS.get(measure, text.plain(measure.replace("_", " "), limit=60))


def model_order(record: Record) -> list[str]:
    """List the models: teacher, student alone, student, then others in the record's order."""
    models = record["models"]
    return [name for name in _ORDER if name in models] + [name for name in models if name not in _ORDER]


def before_after(record: Record) -> Table:
    """Set the models side by side: one row a measure, one column a model, and the gain of the student."""
    names = model_order(record)
    models = [record["models"][name] for name in names]
    rows = [_row(title, models, read, write) for title, read, write in _measures(models)]
    rows = [row for row in rows if any(cell != text.DASH for cell in row[1:])]
    gains = _gains(record)
    if gains:
        rows = [[*row, gains.get(row[0], "")] for row in rows]
    header = ["", *(model_name(record, name) for name in names), *([_gain_title(record)] if gains else [])]
    return Table(header, rows, names.index("student") + 1 if "student" in names else None)


def _row(title: str, models: Sequence[Any], read: Reader, write: Callable[[Any], str]) -> list[str]:
    return [title, *(write(read(model)) for model in models)]


def _measures(models: Sequence[Any]) -> list[tuple[str, Reader, Callable[[Any], str]]]:
    """List (row title, how to read it from a model, how to write it)."""
    metrics = dict.fromkeys(metric for model in models for metric in model["quality"] or {})
    rows: list[tuple[str, Reader, Callable[[Any], str]]] = [
        (text.plain(metric, limit=40), _quality_of(metric), text.quality) for metric in metrics
    ]
    rows.append((label("params"), itemgetter("params"), text.count))
    if any(model["params_nonzero"] not in (None, model["params"]) for model in models):
        rows.append((label("params_nonzero"), itemgetter("params_nonzero"), text.count))
    rows += [
        (label("flops"), itemgetter("flops"), text.count),
        (label("size_bytes"), itemgetter("size_bytes"), text.size),
    ]
    for measure, key, write in (("latency_ms", "p50", text.milliseconds), ("throughput_per_s", "value", _per_second)):
        batches = _batches(models, measure)
        rows += [(f"{label(measure)}, batch {batch}", _batch_of(measure, batch, key), write) for batch in batches]
    rows.append((label("peak_memory_bytes"), itemgetter("peak_memory_bytes"), text.size))
    rows.append((label("energy_j_per_1k"), itemgetter("energy_j_per_1k"), _energy))
    rows.append((label("cost_per_1m"), itemgetter("cost_per_1m"), _cost))
    rows.append((label("runtime"), itemgetter("runtime"), text.runtime_name))
    return rows


def _quality_of(metric: str) -> Reader:
    return lambda model: (model["quality"] or {}).get(metric)


def _batch_of(measure: str, batch: int, key: str) -> Reader:
    return lambda model: _at(model[measure], batch, key)


def _batches(models: Sequence[Any], measure: str) -> list[int]:
    return sorted({row["batch"] for model in models for row in model[measure] or ()})


def _at(rows: Any, batch: int, key: str) -> float | None:
    return next((row[key] for row in rows or () if row["batch"] == batch), None)


def _per_second(value: float | None) -> str:
    return text.DASH if value is None else f"{text.count(value)}/s"


def _energy(value: Any) -> str:
    return f"{text.number(value['value'])} J" if value and value["value"] is not None else text.DASH


def _cost(value: Any) -> str:
    known = value and value["value"] is not None
    return f"{text.number(value['value'])} {text.plain(value['currency'] or '', limit=8)}" if known else text.DASH


def _gain_title(record: Record) -> str:
    after = "student" if "teacher" in record["models"] else " + ".join(adjectives(record)) or "student"
    return f"{before_name(record)} / {after}"


def _gains(record: Record) -> dict[str, str]:
    changed = record.get("pruning") or record.get("quantization")
    names = ("teacher", "baseline", "dense", "float") if changed else ("teacher",)
    if "student" not in record["models"] or not any(name in record["models"] for name in names):
        return {}
    comparison = record["comparison"]
    pairs = {"params": "params_ratio", "params_nonzero": "params_nonzero_ratio", "flops": "flops_ratio"}
    pairs |= {"size_bytes": "size_ratio", "peak_memory_bytes": "memory_ratio"}
    gains = {label(measure): text.times(comparison.get(key)) for measure, key in pairs.items()}
    for measure, key in (("latency_ms", "latency_ratio"), ("throughput_per_s", "throughput_ratio")):
        for row in comparison.get(key) or ():
            gains[f"{label(measure)}, batch {row['batch']}"] = text.times(row["value"])
    return gains


def deployed(record: Record) -> Table | None:
    """List the deployed formats with size, latency and how far they are from the model they came from."""
    entries = record["deployed"]
    if not entries:
        return None
    batches = _batches(entries, "latency_ms")
    header = ["format", "runtime", "file", "size", *(f"latency, batch {batch}" for batch in batches)]
    header += ["quality", label("max_abs_diff"), label("argmax_agreement")]
    rows = []
    for entry in entries:
        agreement = entry["argmax_agreement"]
        quality = next(iter((entry["quality"] or {}).items()), None)
        rows.append(
            [
                text.plain(entry["format"], limit=30),
                _runtime_of_file(entry),
                text.plain(entry["file"] or text.DASH, limit=60),
                text.size(entry["size_bytes"]),
                *(text.milliseconds(_at(entry["latency_ms"], batch, "p50")) for batch in batches),
                f"{text.plain(quality[0], limit=20)} {text.quality(quality[1])}" if quality else text.DASH,
                text.number(entry["max_abs_diff"]),
                text.DASH if agreement is None else f"{100 * agreement:.2f} %",
            ]
        )
    return Table(header, rows)


def _runtime_of_file(entry: Mapping[str, Any]) -> str:
    """Name what runs a file, with the number format that is in it."""
    runtime = entry["runtime"]
    if entry.get("precision") and isinstance(runtime, Mapping):
        runtime = {**runtime, "dtype": precision_of(entry)}
    return text.runtime_name(runtime)


def speedups(record: Record) -> Table | None:
    """Set the student's fastest engine against the reference in torch eager and in its best dense engines."""
    rows = record["comparison"].get("speedup")
    if not rows:
        return None
    header = [
        "batch",
        f"fastest engine of the {model_name(record, 'student')}",
        "over torch eager",
        "over best dense fp32",
        "over best dense bf16",
    ]
    return Table(header, [[str(row["batch"]), text.plain(row["engine"]), *_over(row)] for row in rows])


def _over(row: Mapping[str, Any]) -> list[str]:
    cells = [text.times(row["over_torch_eager"])]
    for key in ("best_dense_fp32", "best_dense_bf16"):
        engine = text.plain(row.get(f"{key}_engine") or "", limit=40)
        ratio = text.times(row[f"over_{key}"])
        cells.append(f"{ratio} ({engine})" if engine and row[f"over_{key}"] is not None else ratio)
    return cells


def fidelity(record: Record) -> Table | None:
    """List how alike student and teacher answer, where the comparison says so."""
    found = record["comparison"].get("fidelity")
    if not found:
        return None
    return Table(["student against teacher", "value"], [[label(name), _cell(value)] for name, value in found.items()])


def stages(record: Record) -> Table | None:
    """List what was done to the model, in order."""
    if not record["stages"]:
        return None
    rows = [
        [text.plain(stage["method"], limit=40), _steps(stage), text.plain(stage["what"], limit=300)]
        for stage in record["stages"]
    ]
    return Table(["stage", "steps", "what"], rows, prose=True)


def _steps(stage: Mapping[str, Any]) -> str:
    start, end = stage["from_step"], stage["to_step"]
    if start is None and end is None:
        return text.DASH
    return f"{'' if start is None else start} {text.DASH} {'' if end is None else end}".strip()


def predicted(record: Record) -> Table | None:
    """Set what was predicted beside what was achieved; the columns are the record's own."""
    entries = record["predicted"]
    if not entries:
        return None
    header = list(dict.fromkeys(key for entry in entries for key in entry))
    rows = [[_cell(entry.get(key)) for key in header] for entry in entries]
    return Table([text.plain(key.replace("_", " "), limit=40) for key in header], rows)


def _cell(value: Any) -> str:
    if value is None:
        return text.DASH
    if isinstance(value, int | float) and not isinstance(value, bool):
        return text.number(value) if isinstance(value, float) else str(value)
    return text.plain(value, limit=120)


def missing(record: Record) -> Table | None:
    """List what was not measured and why; one reason for several models is one row."""
    owners: dict[tuple[str, str], list[str]] = {}
    for owner, part in _parts(record):
        for measure, reason in (part.get("reasons") or {}).items():
            if measure in part and has_null(part[measure]):
                owners.setdefault((measure, reason), []).append(owner)
    rows = [
        [label(measure), ", ".join(names), text.plain(reason, limit=300)] for (measure, reason), names in owners.items()
    ]
    return Table(["not measured", "for", "because"], rows, prose=True) if rows else None


def notes(record: Record) -> list[str]:
    """List remarks on measures that were taken: remarks under other names in `reasons`, and engines that failed."""
    owners: dict[str, list[str]] = {}
    for owner, part in _parts(record):
        for measure, remark in (part.get("reasons") or {}).items():
            if measure not in part:
                owners.setdefault(f"{label(measure)}: {text.plain(remark, limit=300)}", []).append(owner)
        for engine, remark in (part.get("engine_failures") or {}).items():
            said = f"not run in {text.plain(engine, limit=40)}: {text.plain(remark, limit=300)}"
            owners.setdefault(said, []).append(owner)
    return [f"{', '.join(names)}: {said}" for said, names in owners.items()]


def _parts(record: Record) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every part of a record that keeps reasons, with its name for people."""
    for name in model_order(record):
        model = record["models"][name]
        yield model_name(record, name), model
        for engine in model.get("engines", ()):
            yield f"{model_name(record, name)} in {text.plain(engine['engine'], limit=40)}", engine
    for entry in record["deployed"]:
        yield text.plain(entry["format"], limit=30), entry
    yield "comparison", record["comparison"]


def environment(record: Record) -> Table:
    """List when, where and with what the run happened."""
    hardware, git = record["hardware"], record["git"]
    cpu = hardware["cpu"]
    rows = [
        ["started", record["started"]],
        ["wall time", text.duration(record["wall_seconds"])],
        ["seed", str(record["seed"])],
        ["processor", f"{text.plain(cpu['model'] or '?')}, {cpu['cores']} cores, {hardware['threads']} threads"],
        ["memory", text.size(hardware["memory_bytes"])],
        *([["GPU", text.plain(f"{gpu['name']}, {text.size(gpu['memory_bytes'])}")] for gpu in hardware["gpus"]]),
        ["commit", f"{git['commit']}{' with changes' if git['dirty'] else ''}" if git else "not in a git checkout"],
        ["config sha256", record["config_sha256"] or text.DASH],
    ]
    rows += [
        [text.plain(name, limit=40), text.plain(found or "not installed")] for name, found in record["versions"].items()
    ]
    return Table(["", ""], rows, prose=True)
