"""The next token."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.text import Perplexity

from lightning_opt.tasks.base import Task

IGNORED = -100


class TokenAccuracy(Metric):
    """Share of counted positions whose most likely token is the right one.

    torchmetrics' multiclass accuracy keeps a count per class, which for a large vocabulary costs more than the model's
    own last layer.
    """

    correct: Tensor
    total: Tensor
    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count `(B, T, V)` scores against `(B, T)` tokens."""
        counted = target != IGNORED
        self.correct += ((preds.argmax(dim=-1) == target) & counted).sum()
        self.total += counted.sum()

    def compute(self) -> Tensor:
        return self.correct / self.total.clamp(min=1)


class LanguageModeling(Task):
    """Predict `(B, T, V)` logits for `(B, T)` next tokens; positions labelled -100 do not count.

    The data module has already shifted the labels: `labels[b, t]` is the token that follows `input_ids[b, t]`.

    Args:
        num_outputs: Vocabulary size V.
    """

    main_metric = "perplexity"
    higher_is_better = False

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)

    def mask(self, labels: Tensor) -> Tensor | None:
        return labels != IGNORED

    def for_metrics(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits.float(), labels

    def _metrics(self) -> dict[str, Metric]:
        return {"perplexity": Perplexity(ignore_index=IGNORED), "acc": TokenAccuracy()}
