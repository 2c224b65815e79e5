"""A model alone: the plain fine-tune, and the control for every claim."""

from collections.abc import Collection

from torch import Tensor
from typing_extensions import override

from lightning_opt.losses import Signals
from lightning_opt.modules.base import TaskModule
from lightning_opt.modules.context import StepContext


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
    def loss_terms(
        self, student: Signals, context: StepContext, *, only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        return {"task": self.task.loss(student.logits, context.labels)}
