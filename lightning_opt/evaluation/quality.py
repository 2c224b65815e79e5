"""Read a model's answers over a data set, and score them with any metric that has `update` and `compute`."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_opt.evaluation.inputs import to_device
from lightning_opt.evaluation.state import evaluation_mode
from lightning_opt.forward import Inputs, predict


class Metric(Protocol):
    """What torchmetrics' metrics and collections are: something that is fed batches and then asked."""

    def update(self, preds: Tensor, target: Tensor) -> Any:
        """Take in one batch."""

    def compute(self) -> Any:
        """Return a value, or a dict of named values."""


def evaluate(
    predictor: Callable[[Inputs], Tensor],
    batches: Iterable[tuple[Inputs, Tensor]],
    metric: Metric,
    *,
    for_metric: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> dict[str, float]:
    """Score `predictor` over `batches` and return the metric's values as plain numbers.

    Args:
        predictor: Inputs -> logits; a model, or an engine that runs an exported file.
        batches: Pairs of inputs and labels.
        metric: Something with `update(preds, target)` and `compute()`.
        for_metric: Turns (logits, labels) into what the metric reads, such as a task's `for_metrics`.
    """
    with torch.inference_mode():
        for inputs, labels in batches:
            logits = predictor(inputs)
            pair = (logits, labels) if for_metric is None else for_metric(logits, labels)
            metric.update(*pair)
    values = metric.compute()
    named = values if isinstance(values, dict) else {type(metric).__name__.lower(): values}
    return {str(name): float(value) for name, value in named.items()}


def collect_logits(
    model: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return the logits of all batches and their labels, joined along axis 0, on the CPU.

    The model runs in eval mode and is handed back in the mode it came in. All logits are held in memory: for
    language models, whose logits are large, score batch by batch with `evaluate`.

    Raises:
        ValueError: There is no batch.
    """
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.inference_mode(), evaluation_mode(model):
        for inputs, target in batches:
            logits.append(predict(model, to_device(inputs, device)).cpu())
            labels.append(target.cpu())
    if not logits:
        raise ValueError("batches is empty: there is nothing to collect logits from")
    return torch.cat(logits), torch.cat(labels)
