"""Ask what changes or splits the model whether it can, before time is spent on the dense control."""

import math
from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from lightning_opt.callbacks.moments import Length
from lightning_opt.cli.spread import asks_the_model, check_network
from lightning_opt.config.build import Config, build_model
from lightning_opt.config.build_fit import build_trainer, changes_model
from lightning_opt.tasks import Task


def check_changes(trainer: pl.Trainer, network: nn.Module, datamodule: pl.LightningDataModule | None = None) -> None:
    """Refuse what a trainer's callbacks cannot do to a network, or with the data where they are ready.

    Raises:
        ConfigError: Naming the argument and the value.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    known = {}
    if datamodule is not None:
        known["length"] = _length(trainer, datamodule)
        if hasattr(datamodule, "example_inputs"):
            known["example_inputs"] = datamodule.example_inputs(2)
    for callback in callbacks:
        if changes_model(callback) and hasattr(callback, "check"):
            callback.check(network, **known)


def check_before_fits(config: Config, task: Task, datamodule: pl.LightningDataModule) -> None:
    """Look at a run's callbacks and its strategy with its data at hand.

    Raises:
        ConfigError: Naming the argument and the value.
    """
    trainer, _ = build_trainer(config, Path("never-written"), task)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not asks_the_model(trainer) and not any(changes_model(callback) for callback in callbacks):
        return
    datamodule.prepare_data()
    datamodule.setup("fit")
    network = build_model(config["model"])
    if hasattr(datamodule, "example_inputs"):
        check_network(trainer, network, datamodule.example_inputs(2))
    check_changes(trainer, network, datamodule)


def _length(trainer: pl.Trainer, datamodule: pl.LightningDataModule) -> Length | None:
    """Return how long training will be; None where the data do not say."""
    loader = datamodule.train_dataloader()
    limit = trainer.limit_train_batches
    try:
        batches = len(loader)
    except TypeError:
        return None
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    return Length.bounded(trainer, math.ceil(batches / trainer.accumulate_grad_batches))
