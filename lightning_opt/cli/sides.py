"""The models that a run compares, each in the form in which it is measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_opt.cli import quantized
from lightning_opt.cli.fitting import Fitted, show
from lightning_opt.cli.judging import quality_of
from lightning_opt.cli.log import log
from lightning_opt.cli.pruned import UNTRAINED, dense_of, was_pruned
from lightning_opt.cli.teachers import Found
from lightning_opt.config.build import Config
from lightning_opt.evaluation import count_nonzero, count_parameters, safetensors_bytes
from lightning_opt.forward import predict
from lightning_opt.modules import Teacher
from lightning_opt.modules.matching import mix_of
from lightning_opt.modules.teacher import Ensemble
from lightning_opt.reporting import model_entry
from lightning_opt.tasks import Task

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What a run compares.

    Attributes:
        models: By their names in the record; "student" is what is deployed.
        quality: Of those that were judged.
        dense: Name of the model before it was pruned; None where nothing was pruned.
        forms: The forms of the quantized model; None where nothing was quantized.
    """

    models: dict[str, nn.Module]
    quality: dict[str, dict[str, float]]
    dense: str | None = None
    forms: quantized.Quantized | None = None


def gather(
    config: Config,
    folder: Path,
    fitted: dict[str, Fitted],
    found: Found,
    task: Task,
    data: pl.LightningDataModule,
) -> Sides:
    """Gather the models that are compared, each in the form in which it is measured."""
    models: dict[str, nn.Module] = {name: each.model for name, each in fitted.items()}
    quality = {name: each.quality for name, each in fitted.items()}
    models["student"] = quantized.deployable(models["student"])
    if found.teachers:
        answering = as_one(found.teachers, task)
        models = {"teacher": answering, **models}
        quality["teacher"] = quality_of(lambda inputs: predict(answering, inputs), task, data)
        log.info("teacher: %s", show(quality["teacher"]))
    dense = None
    if was_pruned(config, fitted["student"]):
        dense, before = dense_of(config, models)
        models = {dense: before, **models}
    if not quantized.was_quantized(config, fitted["student"]):
        return Sides(models=models, quality=quality, dense=dense)
    forms = quantized.quantized_of(config, fitted, pruned=dense is not None)
    if forms.reference not in models:
        floating = quantized.float_model(config, folder, forms)
        quality[forms.reference] = quality_of(lambda inputs: predict(floating, inputs), task, data)
        log.info("before quantization: %s", show(quality[forms.reference]))
        models = {forms.reference: floating, **models}
    models["student"] = forms.integer
    return Sides(models=models, quality=quality, dense=dense, forms=forms)


def as_one(teachers: list[Teacher], task: Task) -> nn.Module:
    """Return the network that stands for all teachers: itself where there is one, else their ensemble."""
    if len(teachers) == 1:
        return teachers[0].answering
    return Ensemble([teacher.answering for teacher in teachers], mix=mix_of(task))


def entries_of(sides: Sides, measured: dict[str, Record]) -> dict[str, Record]:
    """Complete each model's part of the record; a model that was only built has no quality."""
    entries = {}
    for name, model in sides.models.items():
        facts = quantized.facts_of(sides.forms) if sides.forms and name == "student" else _facts(model)
        values = facts | measured.get(name, {}) | {"quality": sides.quality.get(name)}
        if sides.forms and name == "student":
            values |= facts  # integers are no parameters: those are counted before they were rounded
        if name not in sides.quality:
            values["reasons"] = {**(values.get("reasons") or {}), "quality": UNTRAINED}
        entries[name] = model_entry(values, reason="benchmark=false")
    return entries


def _facts(model: nn.Module) -> Record:
    """Return what is known of a model without running it."""
    return {
        "params": count_parameters(model),
        "params_nonzero": count_nonzero(model),
        "size_bytes": safetensors_bytes(model),
    }
