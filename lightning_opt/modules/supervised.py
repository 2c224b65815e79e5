"""A model alone: the plain fine-tune, and the control for every claim."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_opt.modules.base import TaskModule


class Supervised(TaskModule):
    """Minimise the task's own loss.

    Example:
        >>> import torch
        >>> from lightning_opt.tasks import Classification
        >>> module = Supervised(torch.nn.Linear(4, 3), task=Classification(num_outputs=3))
        >>> module(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        example = self.task.read(batch)
        loss = self.task.loss(self.task.logits(self.model, example.inputs), self.labels_of(example))
        self.log_terms({"loss": loss})
        return loss
