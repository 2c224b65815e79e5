"""The loops that are compared: written by hand, with torchdistill's loss, bare Lightning, and ours.

All train the same student from the same weights with the same optimizer on the same batches.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from pairs import Batches, Mode, Pair, call, fetch, split
from relay import Body, Lap
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.losses import KD, FixedWeights, Term
from lightning_opt.losses.teachers import mix_probabilities
from lightning_opt.modules import Distillation, Supervised, Teacher, TeacherCache
from lightning_opt.modules.teacher_cache import store
from lightning_opt.tasks import Classification

TEMPERATURE, KD_WEIGHT = 4.0, 0.9
LossOf = Callable[[Tensor, Tensor, Any], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, inputs: Any) -> Tensor:
    return F.cross_entropy(logits, labels)


def kd(mode: Mode) -> LossOf:
    """The loss as one writes it by hand."""

    def loss(logits: Tensor, labels: Tensor, inputs: Any) -> Tensor:
        target = (mode.answer(inputs) / TEMPERATURE).softmax(dim=1)
        soft = F.kl_div((logits / TEMPERATURE).log_softmax(dim=1), target, reduction="batchmean")
        return F.cross_entropy(logits, labels) + KD_WEIGHT * TEMPERATURE**2 * soft

    return loss


def kd_of_torchdistill(mode: Mode, peer: ModuleType) -> LossOf:
    module = peer.KDLoss("head", "output", "head", "output", temperature=TEMPERATURE, alpha=1.0, beta=KD_WEIGHT)

    def loss(logits: Tensor, labels: Tensor, inputs: Any) -> Tensor:
        return module({"head": {"output": logits}}, {"head": {"output": mode.answer(inputs)}}, labels)

    return loss


def student_of(pair: Pair) -> nn.Module:
    torch.manual_seed(2)
    return pair.student()


def teacher_alone(mode: Mode, batches: Batches, lap: Lap) -> None:
    for batch in batches:
        if not lap():
            return
        mode.answer(split(batch)[0])


def by_hand(pair: Pair, loss_of: LossOf, batches: Batches, lap: Lap) -> None:
    student = student_of(pair).train()
    optimizer = pair.optimizer(student.parameters())
    for batch in batches:
        if not lap():
            return
        inputs, labels = split(batch)
        optimizer.zero_grad()
        loss_of(call(student, inputs), labels, inputs).backward()
        optimizer.step()


class Bare(pl.LightningModule):
    """The least that Lightning asks for."""

    def __init__(self, pair: Pair, loss_of: LossOf) -> None:
        super().__init__()
        self.student = student_of(pair)
        self.pair, self.loss_of = pair, loss_of

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = split(batch)
        return self.loss_of(call(self.student, inputs), labels, inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.pair.optimizer(self.student.parameters())


class Wait(pl.Callback):
    """Wait for one's turn at the start of each step; end the fit when there is no turn any more."""

    def __init__(self, lap: Lap) -> None:
        self.lap = lap

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.lap():
            trainer.should_stop = True


def fit(make: Callable[[], pl.LightningModule], batches: Batches, lap: Lap) -> None:
    """Train in a Trainer with everything off that a step could pay for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Wait(lap)],
        )
        trainer.fit(make(), batches)


def supervised(pair: Pair) -> pl.LightningModule:
    return Supervised(student_of(pair), task=Classification(num_outputs=pair.classes), optimizer=pair.optimizer)


def distillation(pair: Pair, mode: Mode, cache: TeacherCache | None = None) -> pl.LightningModule:
    return Distillation(
        student_of(pair),
        Teacher(mode.model, dtype=mode.dtype),
        task=Classification(num_outputs=pair.classes),
        losses=[Term(KD(temperature=TEMPERATURE), weight=KD_WEIGHT)],
        optimizer=pair.optimizer,
        cache=cache,
    )


def contenders(pair: Pair, mode: Mode, *, peer: ModuleType | None, folder: Path) -> dict[str, Body]:
    """Return every loop by name.

    Args:
        pair: The networks.
        mode: How every contender asks its teacher.
        peer: torchdistill's losses, where they are to be compared.
        folder: Where the teacher's cache goes.
    """
    tensors = pair.tensors()
    batches = Batches(tensors, batch=pair.batch)
    cache = store(
        folder / "cache",
        [Teacher(mode.model, dtype=mode.dtype)],
        fetch=fetch(tensors),
        num_samples=len(tensors["labels"]),
        versions=1,
        weighting=FixedWeights(),
        mix=mix_probabilities,
        batch_size=pair.batch,
    )
    hand: dict[str, LossOf] = {"ce_hand": cross_entropy, "kd_hand": kd(mode)}
    if peer is not None:
        hand["kd_torchdistill"] = kd_of_torchdistill(mode, peer)
    fits: dict[str, Callable[[], pl.LightningModule]] = {
        "ce_lightning": partial(Bare, pair, cross_entropy),
        "ce_ours": partial(supervised, pair),
        "cached_ours": partial(distillation, pair, mode, cache),
        "kd_lightning": partial(Bare, pair, kd(mode)),
        "kd_ours": partial(distillation, pair, mode),
    }
    return {
        f"teacher {mode.name}": partial(teacher_alone, mode, batches),
        **{name: partial(by_hand, pair, loss, batches) for name, loss in hand.items()},
        **{name: partial(fit, make, batches) for name, make in fits.items()},
    }
