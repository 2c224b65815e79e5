"""What every LightningModule here shares: a task, an optimizer, honest validation and test metrics."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from typing_extensions import override

from lightning_opt.checkpointing.recipe import restore_recipes, save_recipes
from lightning_opt.forward import Inputs
from lightning_opt.losses import Signals, Supervision
from lightning_opt.modules.context import StepContext, count_of
from lightning_opt.tasks import Example, Task

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[..., Any]


class TaskModule(pl.LightningModule):
    """Train and judge `model` on `task`.

    Subclasses give `loss_terms`. Everything that the run claims about quality comes from here, so that a student and
    its control are judged by the same lines.

    A training step is made of parts that a pipeline calls one by one, on the rank that needs each: `context` reads the
    batch, `answer` runs the network, `loss_terms` compares the two, `log_step` adds up and logs.

    Args:
        model: The network; its answer is a tensor or has `logits`.
        task: How to read a batch, the loss and the metrics.
        optimizer: Makes an optimizer from parameters; AdamW with its defaults when not given.
        scheduler: Makes a learning-rate scheduler from `(optimizer, total_steps=...)`, stepped after each optimizer
            step; a constant rate when not given.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: Task,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self._make_optimizer = optimizer or torch.optim.AdamW
        self._make_scheduler = scheduler
        self.val_metrics, self.val_loss = _fresh_metrics(task, "val/")
        self.test_metrics, self.test_loss = _fresh_metrics(task, "test/")

    @override
    def forward(self, inputs: Any) -> Tensor:
        return self.task.logits(self.model, inputs)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        context = self.context(batch)
        return self.log_step(self.loss_terms(self.answer(context.inputs), context))

    def context(self, batch: Any, *, ask: bool = True) -> StepContext:
        """Return what a training step on a batch needs beside the network's answer.

        Args:
            batch: As the loader gives it.
            ask: Whether to ask the teachers, if there are any; a rank that compares nothing need not.
        """
        example = self.task.read(batch)
        return StepContext(inputs=example.inputs, supervision=self.supervision_of(example))

    def answer(self, inputs: Inputs) -> Signals:
        """Run the network in a training step, and return what it says."""
        return Signals(logits=self.task.logits(self.model, inputs))

    def loss_terms(
        self, student: Signals, context: StepContext, *, only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return every weighted part of the loss by name, scalars that the step adds up.

        Args:
            student: What the network said; without logits of use if no part that reads them is asked for.
            context: What it is compared with.
            only: The parts to compute. None: all.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither loss_terms nor training_step")

    def log_step(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Add the parts of the loss up, log what is to be seen of them, and return the sum."""
        total = reduce(torch.add, terms.values())  # cheaper than to stack them: no node more than needed
        self.log_terms({"loss": total})
        return total

    def readers(self) -> dict[str, Sequence[str] | None]:
        """Return the patterns of the modules of `model` that each part of the loss reads; None: its logits."""
        return {"task": None}

    def term_modules(self) -> dict[str, nn.Module]:
        """Return the modules of which parts of the loss are made, by the part's name."""
        return {}

    def term_counts(self, context: StepContext, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return over how many things each part of the loss takes its mean, for batches or parts of batches.

        Args:
            context: Of the batch.
            features: What the network's tapped modules said; shapes alone matter.
        """
        return {"task": count_of(context.supervision, context.supervision.mask)}

    def supervision_of(self, example: Example) -> Supervision:
        """Return what a batch says about the answer to it.

        Raises:
            ValueError: The batch has no labels.
        """
        labels = self.labels_of(example)
        return Supervision(
            labels=labels,
            mask=self.task.mask(labels),
            token_mask=example.token_mask,
            index=example.index,
        )

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._judge(batch, self.val_metrics, self.val_loss)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._judge(batch, self.test_metrics, self.test_loss)

    @override
    def on_validation_epoch_end(self) -> None:
        self._report(self.val_metrics, self.val_loss, "val/loss")

    @override
    def on_test_epoch_end(self) -> None:
        self._report(self.test_metrics, self.test_loss, "test/loss")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self._make_scheduler is None:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == float("inf"):
            raise ValueError("scheduler needs to know when training ends: set trainer.max_epochs or trainer.max_steps")
        scheduler = self._make_scheduler(optimizer, total_steps=int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        save_recipes(self, checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_recipes(self, checkpoint)

    @property
    def progress(self) -> float:
        """Fraction of the optimizer steps that are done, in [0, 1]; 0 where the end is not known."""
        total = self.trainer.estimated_stepping_batches
        # A loader without a length and no max_steps gives -1.
        return min(self.global_step / total, 1.0) if 0 < total < float("inf") else 0.0

    def tapped_modules(self) -> list[str]:
        """Return the patterns of the modules of `model` whose features must stay as wide as they are."""
        return []

    def labels_of(self, example: Example) -> Tensor:
        """Return the labels of a batch that must have some.

        Raises:
            ValueError: The batch has no labels.
        """
        if example.labels is None:
            raise ValueError("the batch has no labels; a dict batch needs the key 'labels'")
        return example.labels

    def log_terms(self, terms: dict[str, Tensor]) -> None:
        """Log training numbers under `train/`, on the steps that are logged at all."""
        # A call to `log` costs about as much as a small network's whole step.
        every = max(int(getattr(self.trainer, "log_every_n_steps", 1)), 1)
        if (self.global_step + 1) % every == 0:
            logged = {f"train/{name}": value.detach() for name, value in terms.items()}
            # Of the whole batch, not of this rank's share: the curve is the same on any number of devices.
            self.log_dict(logged, on_step=True, on_epoch=False, sync_dist=self.trainer.world_size > 1)

    def _judge(self, batch: Any, metrics: MetricCollection, mean_loss: MeanMetric) -> None:
        example = self.task.read(batch)
        labels = self.labels_of(example)
        logits = self.task.logits(self.model, example.inputs)
        mask = self.task.mask(labels)
        mean_loss.update(self.task.loss(logits, labels), len(labels) if mask is None else mask.sum())
        metrics.update(*self.task.for_metrics(logits, labels))

    def _report(self, metrics: MetricCollection, mean_loss: MeanMetric, loss_name: str) -> None:
        values = {**metrics.compute(), loss_name: mean_loss.compute()}
        metrics.reset()
        mean_loss.reset()
        main = next(iter(values))
        self.log(main, values.pop(main), prog_bar=True, rank_zero_only=False)
        self.log_dict(values)


def _fresh_metrics(task: Task, prefix: str) -> tuple[MetricCollection, MeanMetric]:
    return task.metrics().clone(prefix=prefix), MeanMetric()
