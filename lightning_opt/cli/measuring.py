"""Measure what a run made: quality, cost of running, what was exported, and what it is worth against the others."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_opt.cli.fitting import Fitted, show
from lightning_opt.cli.log import log
from lightning_opt.cli.pruned import UNTRAINED, dense_of, pruning_of, was_pruned
from lightning_opt.cli.teachers import Found
from lightning_opt.config.build import Config, build_task
from lightning_opt.evaluation import Price, count_nonzero, count_parameters, measure, safetensors_bytes
from lightning_opt.evaluation.fidelity import class_fidelity, label_fidelity, value_fidelity
from lightning_opt.evaluation.quality import evaluate
from lightning_opt.export import LatencyPlan, export, save_artifact
from lightning_opt.forward import Inputs, predict
from lightning_opt.modules import Teacher
from lightning_opt.modules.matching import mix_of
from lightning_opt.modules.teacher import Ensemble
from lightning_opt.reporting import comparison, deployed_entry, model_entry
from lightning_opt.surgery import recipe_of
from lightning_opt.tasks import Multilabel, Regression, Task

Record = dict[str, Any]
_COMPARED_BATCHES = 20


def measure_all(
    config: Config, folder: Path, fitted: dict[str, Fitted], found: Found, data: pl.LightningDataModule
) -> Record:
    """Return the record's measured parts."""
    task = build_task(config)
    data.setup("test")
    models: dict[str, nn.Module] = {name: each.model for name, each in fitted.items()}
    quality = {name: each.quality for name, each in fitted.items()}
    if found.teachers:
        answering = as_one(found.teachers, task)
        models = {"teacher": answering, **models}
        quality["teacher"] = quality_of(lambda inputs: predict(answering, inputs), task, data)
        log.info("teacher: %s", show(quality["teacher"]))
    artifact, student = folder / "artifact", fitted["student"]
    reference, dense = dense_of(config, models) if was_pruned(config, student) else (None, None)
    if reference is not None and dense is not None:
        models = {reference: dense, **models}
    entries = _entries(models, quality, _measured(config, models, data))
    meta = {"task_name": config["task_name"], "quality": student.quality}
    deployed = deploy(config, artifact, student.model, task, data, architecture=config["model"], meta=meta)
    compared = comparison(entries, higher_is_better=task.higher_is_better, deployed=deployed)
    if found.teachers:
        compared["fidelity"] = agreement(models["student"], models["teacher"], task, data)
    _copy_curves(folder, found)
    measured: Record = {
        "models": entries,
        "stages": _stages(config, fitted, found),
        "recipe": recipe_of(student.model).to_list(),
        "deployed": deployed,
        "comparison": compared,
        "best_value": student.best_value,
    }
    if reference is not None and dense is not None:
        measured["pruning"] = pruning_of(models, entries, reference, dense, example_of(data))
    return measured


def _entries(
    models: dict[str, nn.Module], quality: dict[str, dict[str, float]], measured: dict[str, Record]
) -> dict[str, Record]:
    """Complete each model's part of the record; a model that was only built has no quality."""
    entries = {}
    for name, model in models.items():
        values = _facts(model) | measured.get(name, {}) | {"quality": quality.get(name)}
        if name not in quality:
            values["reasons"] = {**(values.get("reasons") or {}), "quality": UNTRAINED}
        entries[name] = model_entry(values, reason="benchmark=false")
    return entries


def as_one(teachers: list[Teacher], task: Task) -> nn.Module:
    """Return the network that stands for all teachers: itself where there is one, else their ensemble."""
    if len(teachers) == 1:
        return teachers[0].answering
    return Ensemble([teacher.answering for teacher in teachers], mix=mix_of(task))


def batches_of_test(
    task: Task, data: pl.LightningDataModule, limit: int | None = None
) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield the test set as pairs of inputs and labels."""
    for number, batch in enumerate(data.test_dataloader()):
        if number == limit:
            return
        example = task.read(batch)
        assert example.labels is not None
        yield example.inputs, example.labels


def quality_of(predictor: Callable[[Inputs], Tensor], task: Task, data: pl.LightningDataModule) -> dict[str, float]:
    """Return the test metrics of anything that turns inputs into logits, the main one first, and its loss last."""
    mean_loss = MeanMetric()

    def for_metrics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mask = task.mask(labels)
        mean_loss.update(task.loss(logits, labels), len(labels) if mask is None else mask.sum())
        return task.for_metrics(logits, labels)

    with torch.no_grad():
        metrics = evaluate(predictor, batches_of_test(task, data), task.metrics(), for_metric=for_metrics)
    return {task.main_metric: metrics.pop(task.main_metric), **metrics, "loss": float(mean_loss.compute())}


def agreement(student: nn.Module, teacher: nn.Module, task: Task, data: pl.LightningDataModule) -> Record:
    """Return how alike student and teacher answer on the first test batches."""
    totals: dict[str, list[float]] = {}
    with torch.no_grad():
        for inputs, labels in batches_of_test(task, data, _COMPARED_BATCHES):
            pair = predict(student, inputs), predict(teacher, inputs)
            for name, value in _fidelity(task)(*pair, mask=task.mask(labels)).items():
                totals.setdefault(name, []).extend([] if value is None else [value] * len(labels))
    return {name: sum(values) / len(values) for name, values in totals.items() if values}


def _fidelity(task: Task) -> Callable[..., dict[str, Any]]:
    if isinstance(task, Regression):
        return value_fidelity
    return label_fidelity if isinstance(task, Multilabel) else class_fidelity


def _facts(model: nn.Module) -> Record:
    """Return what is known of a model without running it."""
    return {
        "params": count_parameters(model),
        "params_nonzero": count_nonzero(model),
        "size_bytes": safetensors_bytes(model),
    }


def _measured(config: Config, models: dict[str, nn.Module], data: pl.LightningDataModule) -> dict[str, Record]:
    """Measure all models side by side, where the config asks for it."""
    asked = dict(config.get("benchmark") or {})
    if not asked:
        return {}
    log.info("measuring %s side by side", ", ".join(models))
    return measure(models, example_of(data), **benchmark_options(asked))


def benchmark_options(asked: Config) -> dict[str, Any]:
    """Return the arguments of `measure` that a benchmark config means."""
    options = {key: value for key, value in asked.items() if value is not None}
    per_hour = options.pop("price_per_hour", None)
    terms = {name: options.pop(name) for name in ("currency", "utilisation") if name in options}
    return options | ({} if per_hour is None else {"price": Price(per_hour=per_hour, **terms)})


def example_of(data: pl.LightningDataModule) -> Inputs:
    """Return one sample's inputs."""
    if hasattr(data, "example_inputs"):
        return data.example_inputs(1)
    batch = next(iter(data.test_dataloader()))
    inputs = batch[0] if isinstance(batch, tuple | list) else {k: v for k, v in batch.items() if k != "labels"}
    if isinstance(inputs, dict):
        return {name: value[:1] for name, value in inputs.items()}
    return inputs[:1]


def deploy(
    config: Config,
    place: Path,
    model: nn.Module,
    task: Task,
    data: pl.LightningDataModule,
    *,
    architecture: Config,
    meta: Record | None = None,
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
    """
    asked, timing = config.get("export") or {}, config.get("benchmark") or {}
    save_artifact(place, model, architecture=architecture, recipe=recipe_of(model), meta=meta)
    if not asked:
        return []
    log.info("exporting to %s", place)
    written = export(
        model,
        example_of(data),
        place,
        formats=asked.get("formats", "auto"),
        batches=[inputs for inputs, _ in batches_of_test(task, data, _COMPARED_BATCHES)],
        latency=LatencyPlan(batch_sizes=timing.get("batch_sizes", (1, 32))) if timing else None,
        quality=lambda predictor: quality_of(predictor, task, data),
        threads=timing.get("threads"),
    )
    for entry in written:
        entry["file"] = f"{place.name}/{entry['file']}" if entry["file"] else None
    return [deployed_entry(entry) for entry in written]


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


def _stage(method: str, steps: int, what: str) -> Record:
    return {"method": method, "from_step": 0, "to_step": steps, "what": what}
