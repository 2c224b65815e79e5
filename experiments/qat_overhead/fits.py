"""Fits in Lightning: what the callback adds to a step while it waits, observes and rounds, and rounds alone."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
from nets import Net, loss_of
from relay import Body, Lap, Runner, race
from torch import Tensor

from lightning_opt.callbacks import Quantize

ENDLESS = 1_000_000


class Bare(pl.LightningModule):
    """The least that Lightning asks for."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.choice = net.model(), net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
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


def _quantize(net: Net, **moments: Any) -> Quantize:
    return Quantize("w8a8", module="net", example_inputs=net.batch()[0], **moments)


CALLBACKS: dict[str, Callable[[Net], list[pl.Callback]]] = {
    "fit, no callback": lambda net: [],
    "fit, Quantize waiting": lambda net: [_quantize(net, start=0.5)],
    "fit, Quantize rounding and observing": lambda net: [_quantize(net, start="1 steps", freeze_batch_norm=None)],
    "fit, Quantize rounding": lambda net: [
        _quantize(net, start="1 steps", freeze_observers="2 steps", freeze_batch_norm="2 steps")
    ],
}


def fits_of(net: Net, *, seconds: float, warmup: int = 3) -> dict[str, list[float]]:
    """Run all fits step by step in turn; return CPU seconds of a step by round (one loop moves, all others wait)."""
    runners = [Runner(name, _body(net, make)) for name, make in CALLBACKS.items()]
    for runner in runners:
        runner.start()
    times = race(runners, turns={}, seconds=seconds, warmup=warmup, at_most=500, at_least=5)
    for runner in runners:
        runner.stop()
    return {name: [step.cpu_s for step in steps] for name, steps in times.items()}


def _body(net: Net, callbacks: Callable[[Net], list[pl.Callback]]) -> Body:
    def body(lap: Lap) -> None:
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
                callbacks=[*callbacks(net), Wait(lap)],
            )
            trainer.fit(Bare(net), Again(net.batch()))

    return body
