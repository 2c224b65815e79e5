"""Write the report of one run: what was achieved, how it was measured, and how to get it again."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_opt.errors import StorageError
from lightning_opt.reporting import pruned_tables, quantized_tables, tables, text
from lightning_opt.reporting.curves import Tables
from lightning_opt.reporting.figures import Drawn, draw_all
from lightning_opt.reporting.metrics import run_metrics
from lightning_opt.reporting.names import model_name
from lightning_opt.reporting.page import Code, Page, Section, write_page
from lightning_opt.reporting.progress import how_far
from lightning_opt.reporting.record import read_record
from lightning_opt.reporting.tables import Table
from lightning_opt.reporting.verdict import verdict

Record = Mapping[str, Any]
Tile = tuple[str, str]
_ENGINES = "engines"  # this figure stands beside the table of engines


def render(run_dir: Path | str) -> tuple[Path, Path]:
    """Write `report.html`, `report.md` and `figures/` of a run folder; parts that the run lacks are left out or named.

    Args:
        run_dir: Holds `record.json`; metrics files are used where there are some.

    Returns:
        The paths of the HTML and of the Markdown report.

    Raises:
        StorageError: There is no readable record, or a file could not be written.
        ConfigError: The record was written by a newer version.
    """
    folder = Path(run_dir)
    folder = folder.parent if folder.is_file() else folder
    record = read_record(folder)
    warnings = [text.plain(words, limit=400) for words in record["warnings"]]
    curves: Tables = {}
    try:
        curves = run_metrics(folder)
    except StorageError as error:
        warnings.append(text.plain(f"There are no curves: {error}", limit=400))
    said = verdict(record)
    page = Page(
        title=title_of(record, folder),
        kicker=" · ".join(_facts(record)),
        verdict=said.sentence,
        mood=said.mood,
        caveats=[*said.caveats, *how_far(folder, record, curves)],
        tiles=_tiles(record),
        warnings=warnings,
        sections=_sections(folder, record, curves),
    )
    return write_page(page, folder, "report")


def title_of(record: Record, folder: Path) -> str:
    """Name a run by its task and its folder."""
    name = text.plain(folder.resolve().name, limit=60)
    task = text.plain(record.get("task_name") or "", limit=60)
    return f"{task}, {name}" if task and task != name else name


def _facts(record: Record) -> list[str]:
    """List the few facts that tell one run from another: status, date, duration, seed, machine."""
    started = record["started"]
    facts = [record["status"], f"{started[:16].replace('T', ' ')} {'UTC' if started.endswith('Z') else started[-6:]}"]
    if record["wall_seconds"] is not None:
        facts.append(f"took {text.duration(record['wall_seconds'])}")
    if record["seed"] is not None:
        facts.append(f"seed {record['seed']}")
    cpu, gpus = record["hardware"]["cpu"]["model"], record["hardware"]["gpus"]
    machine = text.plain(gpus[0]["name"] if gpus else cpu or "", limit=50)
    return [*facts, machine] if machine else facts


def _tiles(record: Record) -> list[Tile]:
    """Pick up to four large numbers: quality, share of the gap, size, latency."""
    if record.get("quantization"):
        return quantized_tables.tiles(record)
    if record.get("pruning"):
        return pruned_tables.tiles(record)
    comparison, models = record["comparison"], record["models"]
    tiles: list[Tile] = []
    metric = comparison.get("metric")
    values = {name: (models[name]["quality"] or {}).get(metric) for name in tables.model_order(record)}
    if values.get("student") is not None:
        others = {"teacher": "teacher", "baseline": "student alone"}
        known = [
            f"{words} {text.quality(values[name])}" for name, words in others.items() if values.get(name) is not None
        ]
        words = text.plain(metric, limit=24)
        tiles.append((text.quality(values["student"]), f"{words} ({', '.join(known)})" if known else words))
    if comparison.get("gap_closure") is not None:
        share = f"{100 * comparison['gap_closure']:.0f} %"
        tiles.append((share, "of the gap between student alone and teacher closed"))
    if comparison.get("size_ratio"):
        tiles.append(_ratio_tile(comparison["size_ratio"], ("smaller", "larger"), _sizes(models)))
    latency = next(iter(comparison.get("latency_ratio") or ()), None)
    if latency:
        where = f"at batch {latency['batch']}: {_latencies(models, latency['batch'])}"
        tiles.append(_ratio_tile(latency["value"], ("faster", "slower"), where))
    return tiles


def _ratio_tile(ratio: float, words: tuple[str, str], detail: str) -> Tile:
    better = ratio >= 1
    return text.times(ratio if better else 1 / ratio), f"{words[0 if better else 1]} {detail}"


def _reference(models: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((models[name] for name in ("teacher", "baseline") if name in models), {})


def _sizes(models: Mapping[str, Any]) -> str:
    before, after = (model.get("size_bytes") for model in (_reference(models), models.get("student", {})))
    return f"on disk: {text.size(before)} to {text.size(after)}"


def _latencies(models: Mapping[str, Any], batch: int) -> str:
    before, after = (
        next((row["p50"] for row in model.get("latency_ms") or () if row["batch"] == batch), None)
        for model in (_reference(models), models.get("student", {}))
    )
    return f"{text.milliseconds(before)} to {text.milliseconds(after)}"


def _sections(folder: Path, record: Record, curves: Tables) -> list[Section]:
    drawn = draw_all(folder, record, curves)
    return [
        _deploy(record, [figure for figure in drawn if figure.path.stem == _ENGINES]),
        Section("Before and after", _some(_before_after(record)), remarks=_how_measured(record)),
        _quantization(record),
        _pruning(record),
        Section("Against the best engine", _some(_speedups(record))),
        Section("Deployed formats", _some(tables.deployed(record))),
        Section("Figures", figures=[figure for figure in drawn if figure.path.stem != _ENGINES]),
        Section(f"How alike {_student(record)} and teacher answer", _some(tables.fidelity(record))),
        Section("What was done", _some(tables.stages(record)), remarks=_edits(record)),
        Section("Predicted and achieved", _some(tables.predicted(record))),
        Section("What was not measured, and why", _some(tables.missing(record)), remarks=_not_measured(record)),
        _again(folder, record),
        Section("Environment", [tables.environment(record)]),
    ]


def _student(record: Record) -> str:
    changed = record.get("pruning") or record.get("quantization")
    return f"the {model_name(record, 'student')} model" if changed else "student"


def _deploy(record: Record, figures: Sequence[Drawn]) -> Section:
    """Say what to deploy, beside everything that it was chosen from."""
    found = record.get("recommendation")
    if not found or not record.get("quantization"):
        return Section("In each engine", figures=figures)
    made = _some(quantized_tables.ways(record)) + _some(quantized_tables.gains(record))
    return Section("What to deploy on this machine", made, figures, remarks=quantized_tables.rivals(record))


def _quantization(record: Record) -> Section:
    """Say what quantization did: nothing for a run that quantized nothing."""
    found = record.get("quantization")
    if not found:
        return Section("What quantization did")
    made = [quantized_tables.layers(record), quantized_tables.sensitivity(record)]
    if not record.get("recommendation"):  # else both stand at the top
        made = [quantized_tables.ways(record), quantized_tables.gains(record), *made]
    remarks = [
        f"{text.plain(row['name'], limit=60)} stays in float: {text.plain(row['reason'], limit=300)}"
        for row in found["refused"]
    ]
    why = (found.get("reasons") or {}).items()
    remarks += [f"{tables.label(name)}: {text.plain(words, limit=300)}" for name, words in why]
    return Section("What quantization did", [table for table in made if table is not None], remarks=remarks)


def _pruning(record: Record) -> Section:
    """Say what pruning did: nothing for a run that pruned nothing."""
    found = record.get("pruning")
    if not found:
        return Section("What pruning did")
    made = [pruned_tables.totals(record), pruned_tables.engines(record), pruned_tables.sizes(record)]
    made.append(pruned_tables.layers(record))
    why = (found.get("reasons") or {}).items()
    remarks = [f"{tables.label(name)}: {text.plain(words, limit=300)}" for name, words in why]
    return Section("What pruning did", [table for table in made if table is not None], remarks=remarks)


def _some(table: Table | None) -> list[Table]:
    return [] if table is None else [table]


def _before_after(record: Record) -> Table | None:
    return tables.before_after(record) if record["models"] else None


def _speedups(record: Record) -> Table | None:
    """Set the fastest engine against the reference, unless what to deploy says the same."""
    rows = record["comparison"].get("speedup") or ()
    said = record.get("recommendation") and record.get("quantization")
    if said and all(row.get("reference") == record["quantization"]["reference"] for row in rows):
        return None
    return tables.speedups(record)


def _how_measured(record: Record) -> list[str]:
    if not record["models"]:
        return ["No model was measured in this run."]
    if not any(model["latency_ms"] for model in record["models"].values()):
        return []
    said = [
        "Latency is the median of calls on the machine under “Environment”, in which the models took turns.",
        "FLOPs count two for each multiply-accumulate.",
    ]
    if record.get("quantization"):
        said.append(
            "PyTorch eager keeps the integers and computes in float, so its latency shows no gain; the engines do."
        )
    return said


def _edits(record: Record) -> list[str]:
    """Say which structural edits the artifact's recipe holds."""
    names = [text.plain(edit["op"], limit=40) for edit in record["recipe"] or ()]
    if not names:
        return []
    counted = [
        f"{name} ({names.count(name)} times)" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    ]
    return [f"Edits to the structure, kept in the artifact's recipe.json: {', '.join(counted)}."]


def _not_measured(record: Record) -> list[str]:
    remarks = tables.notes(record)
    if remarks or tables.missing(record) or not record["models"]:
        return remarks
    return ["Everything that the record has a place for was measured."]


def _again(folder: Path, record: Record) -> Section:
    """Give the command that repeats the run and the lines that load its model."""
    commit = (record["git"] or {}).get("commit")
    title = f"Run it again, at commit {commit[:12]}" if commit else "Run it again"
    title += ", which had uncommitted changes" if commit and record["git"]["dirty"] else ""
    code = [Code(title, "bash", text.code(record["command"]))]
    if not (folder / "artifact").is_dir():
        return Section("Do it yourself", remarks=["This run left no artifact/ to load a model from."], code=code)
    load = [
        "import torch",
        "import lightning_opt",
        f"model = lightning_opt.load({_shown(folder)!r})  # in eval mode; runs no code from the folder",
        "with torch.no_grad():",
        "    outputs = model(inputs)",
    ]
    return Section(
        "Do it yourself",
        code=[
            *code,
            Code(
                f"Load the {_student(record).removeprefix('the ')}",
                "python",
                text.code("\n".join(load)),
            ),
        ],
    )


def _shown(folder: Path) -> str:
    """Name a folder from the working directory where it lies inside it."""
    path = os.path.relpath(folder)
    return str(folder) if path.startswith("..") else path
