"""What pruning did in a run: the dense model that it is set against, and the record's `pruning`."""

from typing import Any

from torch import nn

from lightning_opt.cli.fitting import Fitted
from lightning_opt.config.build import Config, build_model
from lightning_opt.forward import Inputs
from lightning_opt.pruning.summary import pruning_summary
from lightning_opt.surgery import recipe_of

Record = dict[str, Any]
_OF_QUANTIZATION = frozenset({"quantize", "quantize_on", "convert"})
UNTRAINED = "not trained: these are the shapes before pruning, built to be timed (baseline=true trains the control)"


def was_pruned(config: Config, student: Fitted) -> bool:
    """Tell whether a run pruned, or was asked to: a pruner that did nothing is reported as such."""
    stages = [stage for stage in student.stages if not str(stage["method"]).startswith("quant")]
    edits = [edit for edit in recipe_of(student.model) if edit.op not in _OF_QUANTIZATION]
    return bool(config.get("pruner") or stages or edits)


def dense_of(config: Config, models: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    """Return the model that the pruned one is set against, and its name in the record.

    It is the control where one was trained, else a teacher of the same shapes (the unpruned self), else those shapes
    built anew, which can be timed and counted but not judged.
    """
    if "baseline" in models:
        return "baseline", models["baseline"]
    fresh = build_model(config["model"]).eval()
    if "teacher" in models and _shapes(models["teacher"]) == _shapes(fresh):
        return "teacher", models["teacher"]
    return "dense", fresh


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def pruning_of(
    models: dict[str, nn.Module], entries: dict[str, Record], reference: str, original: nn.Module, inputs: Inputs
) -> Record:
    """Return the record's `pruning`.

    Args:
        models: By their names in the record; "student" is the pruned one.
        entries: Their measures, all from one interleaved measurement.
        reference: Name of the dense one.
        original: The dense one.
        inputs: One sample, for counting operations.
    """
    student = models["student"]
    summary = pruning_summary(
        student,
        original,
        recipe=recipe_of(student),
        example_inputs=inputs,
        dense=entries[reference],
        pruned=entries["student"],
    )
    return {**summary, "reference": reference}
