"""Measure what a run made: quality, cost of running, what was exported, and what it is worth against the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_opt.cli import quantized
from lightning_opt.cli.alternatives import write_alternatives
from lightning_opt.cli.deploying import runners_of, with_times, written
from lightning_opt.cli.fitting import Fitted
from lightning_opt.cli.judging import agreement, example_of, quality_of
from lightning_opt.cli.log import log
from lightning_opt.cli.pruned import pruning_of, was_pruned
from lightning_opt.cli.sides import Sides, entries_of, gather
from lightning_opt.cli.teachers import Found
from lightning_opt.config.build import Config, build_task
from lightning_opt.evaluation import (
    Measured,
    Price,
    measure_beside,
)
from lightning_opt.export import LatencyPlan, save_artifact
from lightning_opt.forward import Inputs
from lightning_opt.reporting import comparison
from lightning_opt.surgery import recipe_of
from lightning_opt.tasks import Task

Record = dict[str, Any]


def measure_all(
    config: Config, folder: Path, fitted: dict[str, Fitted], found: Found, data: pl.LightningDataModule
) -> Record:
    """Return the record's measured parts: all models in all engines and all files, timed in one measurement."""
    task = build_task(config)
    data.setup("test")
    student = fitted["student"]
    sides = gather(config, folder, fitted, found, task, data)
    model = sides.models["student"]
    artifact, meta = folder / "artifact", {"task_name": config["task_name"], "quality": student.quality}
    deployed = deploy(config, artifact, model, task, data, architecture=config["model"], meta=meta, timed=False)
    deployed += write_alternatives(config, folder, sides, task, data)
    measured = _measured(config, sides, deployed, folder, task, data)
    deployed = with_times(deployed, measured)
    entries = entries_of(sides, measured.models)
    compared = comparison(entries, higher_is_better=task.higher_is_better, deployed=deployed)
    if found.teachers:
        compared["fidelity"] = agreement(model, sides.models["teacher"], task, data)
    _copy_curves(folder, found)
    return {
        "models": entries,
        "stages": [_without_layers(stage) for stage in _stages(config, fitted, found)],
        "recipe": recipe_of(model).to_list(),
        **_quantization(config, folder, sides, entries, deployed, compared, task, data),
        **_pruning(sides, entries, data),
        "deployed": deployed,
        "comparison": compared,
        "best_value": student.best_value,
    }


def _quantization(
    config: Config,
    folder: Path,
    sides: Sides,
    entries: dict[str, Record],
    deployed: list[Record],
    compared: Record,
    task: Task,
    data: pl.LightningDataModule,
) -> Record:
    """Return what a run that quantized adds to its record; its files and its comparison are completed."""
    if sides.forms is None:
        return {}
    compared |= quantized.compared_with_float(sides.forms, entries, deployed)
    terms: dict[str, Any] = {"metric": task.main_metric, "higher_is_better": task.higher_is_better}
    made = quantized.quantization_of(config, sides.forms, entries, deployed, folder, example_of(data), **terms)
    return {
        "quantization": made,
        "recommendation": quantized.recommended(config, sides.forms, entries, deployed, **terms),
    }


def _pruning(sides: Sides, entries: dict[str, Record], data: pl.LightningDataModule) -> Record:
    """Return what a run that pruned adds to its record; one that quantized too is shown before that."""
    if sides.dense is None:
        return {}
    models, shown = sides.models, entries
    if sides.forms is not None:
        models = {**models, "student": sides.forms.twin}
        shown = {**entries, "student": entries.get("float", entries["student"])}
    return {"pruning": pruning_of(models, shown, sides.dense, models[sides.dense], example_of(data))}


def _measured(
    config: Config, sides: Sides, deployed: list[Record], folder: Path, task: Task, data: pl.LightningDataModule
) -> Measured:
    """Measure all models and all files side by side, where the config asks for it."""
    asked = dict(config.get("benchmark") or {})
    if not asked:
        return Measured(models={})
    runners = runners_of(deployed, folder, sides.models["student"], threads=asked.get("threads"))
    log.info("measuring %s side by side", ", ".join([*sides.models, *runners]))

    def judge(predictor: Callable[[Inputs], Tensor]) -> dict[str, float]:
        return quality_of(predictor, task, data)

    return measure_beside(
        sides.models,
        example_of(data),
        runners=runners,
        # The files stand for a quantized model in the other engines.
        only_eager=["student"] if sides.forms else [],
        judge=judge if sides.forms else None,
        **benchmark_options(asked),
    )


def benchmark_options(asked: Config) -> dict[str, Any]:
    """Return the arguments of `measure` that a benchmark config means."""
    options = {key: value for key, value in asked.items() if value is not None}
    per_hour = options.pop("price_per_hour", None)
    terms = {name: options.pop(name) for name in ("currency", "utilisation") if name in options}
    return options | ({} if per_hour is None else {"price": Price(per_hour=per_hour, **terms)})


def deploy(
    config: Config,
    place: Path,
    model: nn.Module,
    task: Task,
    data: pl.LightningDataModule,
    *,
    architecture: Config,
    meta: Record | None = None,
    timed: bool = True,
) -> list[Record]:
    """Write a model as an artifact, and in the other formats asked for; each file is read back and compared.

    Args:
        config: Its parts `export` and `benchmark` say which formats, and how they are timed.
        place: The artifact's folder.
        model: In eval mode, on the CPU.
        task: Judges the answers of each file.
        data: Gives the test set.
        architecture: The model's own config.
        meta: Plain values for the artifact's manifest.
        timed: Time the files beside each other; else that is left to a measurement with the models among them.
    """
    asked, timing = config.get("export") or {}, config.get("benchmark") or {}
    save_artifact(place, model, architecture=architecture, recipe=recipe_of(model), meta=meta)
    if not asked:
        return []
    log.info("exporting to %s", place)
    latency = LatencyPlan(batch_sizes=timing.get("batch_sizes", (1, 32))) if timing and timed else None
    return written(config, place, model, task, data, formats=asked.get("formats", "auto"), latency=latency)


def _copy_curves(folder: Path, found: Found) -> None:
    """Keep the teacher's curves with the run: its own folder may be emptied one day."""
    for source in found.folders[:1]:
        if (source / "metrics.csv").is_file():
            (folder / "metrics_teacher.csv").write_bytes((source / "metrics.csv").read_bytes())


def _stages(config: Config, fitted: dict[str, Fitted], found: Found) -> list[Record]:
    """Say what was done from which step to which."""
    stages = []
    if found.folders:
        stages.append(_stage("teacher", found.steps, f"trained on labels, {found.wall_seconds:.1f} s"))
    if "baseline" in fitted:
        alone = fitted["baseline"]
        who = "the dense model alone" if was_pruned(config, fitted["student"]) else "the student alone"
        stages.append(_stage("supervised", alone.steps, f"{who}, {alone.wall_seconds:.1f} s"))
    student = fitted["student"]
    terms = (config.get("loss") or {}).get("terms") if found.teachers else None
    what = f"losses: labels, {', '.join(name for name in terms if terms[name])}" if terms else "loss on labels"
    method = "distillation" if terms else "supervised"
    stages.append(_stage(method, student.steps, f"{what}, {student.wall_seconds:.1f} s"))
    return stages + student.stages


def _without_layers(stage: Record) -> Record:
    """Leave out what is said layer by layer: that has a place of its own in the record."""
    return {name: value for name, value in stage.items() if name != "layers"}


def _stage(method: str, steps: int, what: str) -> Record:
    return {"method": method, "from_step": 0, "to_step": steps, "what": what}
