"""Judge models and files on the test set, and say how alike two answer."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_opt.evaluation.fidelity import class_fidelity, label_fidelity, value_fidelity
from lightning_opt.evaluation.quality import evaluate
from lightning_opt.forward import Inputs, predict
from lightning_opt.tasks import Multilabel, Regression, Task

Record = dict[str, Any]
COMPARED_BATCHES = 20


def example_of(data: pl.LightningDataModule) -> Inputs:
    """Return one sample's inputs."""
    if hasattr(data, "example_inputs"):
        return data.example_inputs(1)
    batch = next(iter(data.test_dataloader()))
    inputs = batch[0] if isinstance(batch, tuple | list) else {k: v for k, v in batch.items() if k != "labels"}
    if isinstance(inputs, dict):
        return {name: value[:1] for name, value in inputs.items()}
    return inputs[:1]


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
        for inputs, labels in batches_of_test(task, data, COMPARED_BATCHES):
            pair = predict(student, inputs), predict(teacher, inputs)
            for name, value in _fidelity(task)(*pair, mask=task.mask(labels)).items():
                totals.setdefault(name, []).extend([] if value is None else [value] * len(labels))
    return {name: sum(values) / len(values) for name, values in totals.items() if values}


def _fidelity(task: Task) -> Callable[..., dict[str, Any]]:
    if isinstance(task, Regression):
        return value_fidelity
    return label_fidelity if isinstance(task, Multilabel) else class_fidelity
