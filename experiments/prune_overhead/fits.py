"""Fits in Lightning: what callbacks add to a step, idle and while masks hold, beside Lightning's own `ModelPruning`."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from core import SPARSITY, layers
from lightning.pytorch.callbacks import ModelPruning
from nets import Net
from relay import Body, Lap, Runner, race
from torch import Tensor
from torch.nn import functional as F

from lightning_opt.callbacks import Prune
from lightning_opt.pruning.schedules import OneShot

ENDLESS = 1_000_000


class Bare(pl.LightningModule):
    """The least that Lightning asks for."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.choice = net.make(), net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.choice.optimizer(self.net.parameters())


class Again:
    """One batch, again and again, as one very long epoch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        return (self.batch for _ in range(ENDLESS))


class Wait(pl.Callback):
    """Wait for one's turn at the start of each step; end the fit when there is no turn any more."""

    def __init__(self, lap: Lap) -> None:
        self.lap = lap

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.lap():
            trainer.should_stop = True


class AtOnce(ModelPruning):
    """Lightning's callback, which prunes at the end of epochs, made to prune at the start."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.apply_pruning(SPARSITY)


def _peer(module: Bare) -> AtOnce:
    return AtOnce(
        "l1_unstructured",
        parameters_to_prune=layers(module.net),
        amount=SPARSITY,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )


CALLBACKS: dict[str, Callable[[Bare], list[pl.Callback]]] = {
    "fit, no callback": lambda module: [],
    "fit, Prune waiting": lambda module: [Prune(sparsity=SPARSITY, start=0.5, end=0.9, module="net")],
    "fit, Prune masking": lambda module: [
        Prune(sparsity=SPARSITY, start="1 steps", end="1 steps", schedule=OneShot(), module="net")
    ],
    "fit, Lightning's ModelPruning masking": lambda module: [_peer(module)],
}


def fits_of(net: Net, *, seconds: float, block: int, warmup: int) -> dict[str, list[float]]:
    """Run all fits step by step in turn; return CPU seconds of a step by round (one loop moves, all others wait)."""
    runners = [Runner(name, _body(net, make), block=block) for name, make in CALLBACKS.items()]
    for runner in runners:
        runner.start()
    turns = {"fit, no callback": 2, "fit, Prune waiting": 2, "fit, Prune masking": 2}
    times = race(runners, turns=turns, seconds=seconds, warmup=warmup, at_most=500, at_least=5)
    for runner in runners:
        runner.stop()
    return {name: [step.cpu_s for step in steps] for name, steps in times.items()}


def _body(net: Net, callbacks: Callable[[Bare], list[pl.Callback]]) -> Body:
    def body(lap: Lap) -> None:
        module = Bare(net)
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
                callbacks=[*callbacks(module), Wait(lap)],
            )
            trainer.fit(module, Again(net.batch()))

    return body
