"""Any number of labels per sample."""

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAccuracy, MultilabelAveragePrecision, MultilabelF1Score

from lightning_opt.tasks.base import Task


class Multilabel(Task):
    """Judge `(B, C)` logits against `(B, C)` zeros and ones with binary cross-entropy per label.

    Args:
        num_outputs: Number of labels C.
        threshold: Probability from which a label counts as given, in (0, 1).
    """

    main_metric = "f1"

    def __init__(self, *, num_outputs: int, threshold: float = 0.5) -> None:
        super().__init__(num_outputs=num_outputs)
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must be in (0, 1), not {threshold}")
        self.threshold = threshold

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def for_metrics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.float().sigmoid(), labels.long()

    def _metrics(self) -> dict[str, Metric]:
        return {
            "f1": MultilabelF1Score(self.num_outputs, average="macro", threshold=self.threshold),
            "map": MultilabelAveragePrecision(self.num_outputs, average="macro"),
            "acc": MultilabelAccuracy(self.num_outputs, average="macro", threshold=self.threshold),
        }
