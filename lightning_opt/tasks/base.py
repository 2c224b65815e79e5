"""What a task is: how to read a batch, what to minimise, and what counts as good."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_opt.forward import Inputs, predict


@dataclass(frozen=True, kw_only=True)
class Example:
    """One batch, read.

    Attributes:
        inputs: What the model is called with.
        labels: What the loss compares with; None at prediction time.
        index: `(B,)` position of each sample in the training set, where the data module gives it.
        token_mask: `(B, T)` bool, False where a token is padding; None for inputs without tokens.
    """

    inputs: Inputs
    labels: Tensor | None = None
    index: Tensor | None = None
    token_mask: Tensor | None = None


class Task(ABC):
    """Base of all tasks.

    A batch is `(x, y)`, `(x, y, index)`, or a dict whose `labels` and `index` are taken out and whose other entries the
    model is called with. Subclasses give the loss and the metrics.

    Args:
        num_outputs: Width of the model's last axis: classes, labels, targets or vocabulary.

    Raises:
        ValueError: `num_outputs` is smaller than 1.
    """

    main_metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    def __init__(self, *, num_outputs: int) -> None:
        if num_outputs < 1:
            raise ValueError(f"num_outputs must be at least 1, not {num_outputs}")
        self.num_outputs = num_outputs

    def read(self, batch: Any) -> Example:
        """Split a batch into inputs, labels and what else is known.

        Raises:
            TypeError: The batch is neither a dict nor a tuple or list of two or three parts.
        """
        if isinstance(batch, Mapping):
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "index")}
            attention = inputs.get("attention_mask")
            token_mask = attention.bool() if attention is not None else None
            return Example(inputs=inputs, labels=batch.get("labels"), index=batch.get("index"), token_mask=token_mask)
        if isinstance(batch, tuple | list) and len(batch) in (2, 3):
            return Example(inputs=batch[0], labels=batch[1], index=batch[2] if len(batch) == 3 else None)
        kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"a batch must be (inputs, labels[, index]) or a dict with 'labels'; the loader gave a {kind}")

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Call the model, which may answer with a tensor or with a Hugging Face output, and return its main tensor."""
        return predict(model, inputs)

    def mask(self, labels: Tensor) -> Tensor | None:
        """Return which positions count, shaped as the logits without the last axis; None when all do."""
        return None

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    @abstractmethod
    def for_metrics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Turn logits and labels into the `(preds, target)` that the metrics compare."""

    @abstractmethod
    def _metrics(self) -> dict[str, Metric]:
        """Return fresh metrics by name, the main one first."""

    def metrics(self) -> MetricCollection:
        """Return fresh metrics; each phase of a run needs its own."""
        # Without compute groups each metric's state is its own: merging them happens after the first batch, which a
        # resumed run would not repeat in the same order.
        metrics: dict[str, Metric | MetricCollection] = dict(self._metrics())
        return MetricCollection(metrics, compute_groups=False)
