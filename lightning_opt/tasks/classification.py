"""One class out of several per sample."""

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from lightning_opt.tasks.base import Task


class Classification(Task):
    """Classify `(B, C)` logits against `(B,)` class numbers with cross-entropy.

    Args:
        num_outputs: Number of classes C, at least 2.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
    """

    main_metric = "acc"

    def __init__(self, *, num_outputs: int, label_smoothing: float = 0.0) -> None:
        super().__init__(num_outputs=num_outputs)
        if num_outputs < 2:
            raise ValueError(f"num_outputs must be at least 2 for classification, not {num_outputs}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
        self.label_smoothing = label_smoothing

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def for_metrics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.float().softmax(dim=-1), labels

    def _metrics(self) -> dict[str, Metric]:
        return {
            "acc": MulticlassAccuracy(self.num_outputs, average="micro"),
            "f1": MulticlassF1Score(self.num_outputs, average="macro"),
            "ece": MulticlassCalibrationError(self.num_outputs, n_bins=15),
        }
