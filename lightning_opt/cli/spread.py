"""Ask a run's strategy whether it can spread this model over these processes, before any of them is started."""

from collections.abc import Sequence

import lightning.pytorch as pl
from torch import nn

from lightning_opt.callbacks.support import check_pair
from lightning_opt.checkpointing.sharded_strategy import ShardedCheckpointing, check_averages
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.modules.teacher import Teacher


def check_spread(trainer: pl.Trainer, teachers: Sequence[Teacher], module: pl.LightningModule) -> None:
    """Refuse sizes that do not fit, and teachers, callbacks and steps that a strategy cannot follow.

    Raises:
        ConfigError: Naming the keys.
    """
    processes, strategy = processes_of(trainer), trainer.strategy
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if hasattr(strategy, "check_world"):
        strategy.check_world(processes)
    for teacher in teachers:
        teacher.check(strategy, processes)
    for callback in callbacks:
        check_pair(strategy, callback)
    if isinstance(strategy, ShardedCheckpointing):
        check_averages(callbacks, strategy=type(strategy).__name__)
        if trainer.precision == "16-mixed":
            raise ConfigError(
                f"trainer.precision=16-mixed: its loss scaler needs whole gradients, which no process of "
                f"{type(strategy).__name__} has; set trainer.precision=bf16-mixed or strategy=ddp"
            )
    if hasattr(strategy, "check_module"):
        strategy.check_module(module)


def processes_of(trainer: pl.Trainer) -> int:
    """Return how many processes a run has on all machines."""
    return trainer.num_devices * trainer.num_nodes


def asks_the_model(trainer: pl.Trainer) -> bool:
    """Whether the strategy can look at a network before processes are started."""
    return hasattr(trainer.strategy, "check_model")


def check_network(trainer: pl.Trainer, network: nn.Module, example_inputs: Inputs) -> None:
    """Refuse a network that a strategy cannot split: a plan that matches nothing, heads that do not divide, no cut.

    Raises:
        ConfigError: Naming the key and where.
    """
    strategy = trainer.strategy
    if hasattr(strategy, "check_world"):
        strategy.check_world(processes_of(trainer))
    if hasattr(strategy, "check_model"):
        strategy.check_model(network, example_inputs)
