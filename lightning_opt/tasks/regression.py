"""A number, or several, per sample."""

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, PearsonCorrCoef

from lightning_opt.tasks.base import Task


class Regression(Task):
    """Predict `(B, num_outputs)` numbers, or `(B,)` when there is one, with the mean squared error.

    Args:
        num_outputs: How many numbers per sample.
    """

    main_metric = "mae"
    higher_is_better = False

    def __init__(self, *, num_outputs: int = 1) -> None:
        super().__init__(num_outputs=num_outputs)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(*_same_shape(logits, labels))

    def for_metrics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        preds, target = _same_shape(logits.float(), labels.float())
        return (preds.flatten(), target.flatten()) if self.num_outputs == 1 else (preds, target)

    def _metrics(self) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
        }
        if self.num_outputs == 1:
            metrics["pearson"] = PearsonCorrCoef()
        return metrics


def _same_shape(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give both tensors the logits' shape: a `(B, 1)` answer against `(B,)` labels would broadcast to `(B, B)`.

    Raises:
        ValueError: The numbers of elements differ.
    """
    if logits.numel() != labels.numel():
        raise ValueError(f"the model gave {tuple(logits.shape)} for labels {tuple(labels.shape)}")
    return logits, labels.to(logits.dtype).reshape(logits.shape)
