"""What a pipeline refuses, and why."""

from typing import Any

import lightning.pytorch as pl

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.losses import DistillationLoss
from lightning_opt.modules import Distillation, TaskModule
from lightning_opt.strategies.pipeline.schedules import stages_per_process


def check_sizes(processes: int, *, pipelines: int, stages: int | None, schedule: str) -> None:
    """Refuse sizes that do not multiply to the number of processes.

    Raises:
        ConfigError: They do not; the message names the key and what to set.
    """
    if processes % pipelines:
        raise ConfigError(
            f"strategy.data_parallel_size={pipelines} does not divide the {processes} processes of trainer.devices "
            "times trainer.num_nodes; set one of them"
        )
    each = processes // pipelines
    if each < 2:
        raise ConfigError(
            f"strategy=pipeline needs at least 2 processes for each of its {pipelines} pipelines, and trainer.devices "
            f"times trainer.num_nodes is {processes}; set trainer.devices={2 * pipelines}"
        )
    stages_per_process(schedule, stages, each)


def check_module(module: "pl.LightningModule") -> None:
    """Refuse a LightningModule whose training step cannot be taken apart.

    Raises:
        ConfigError: It is none of ours, has a training step of its own, or a loss that looks at the whole batch.
    """
    name = type(module).__name__
    own = [method for method in ("training_step", "answer") if not _is_ours(module, method)]
    if not isinstance(module, TaskModule) or own:
        raise ConfigError(
            f"strategy=pipeline needs a training step in parts, and {name} "
            f"{'defines ' + own[0] + ' itself' if isinstance(module, TaskModule) else 'is no TaskModule'}: derive from "
            "lightning_opt.modules.TaskModule and give loss_terms(student, context) (and context, if the batch is "
            "special), or choose another strategy"
        )
    network = module.model
    if network._compiled_call_impl is not None or hasattr(network, "_orig_mod"):
        raise ConfigError(
            f"strategy=pipeline runs parts of {type(network).__name__} and cannot take one that is compiled as a "
            "whole; set compile=false or choose another strategy"
        )
    for term_name, term in module.term_modules().items():
        for loss in term.modules():
            if isinstance(loss, DistillationLoss) and loss.couples_samples:
                raise ConfigError(
                    f"loss.terms.{term_name}: {type(loss).__name__} compares the samples of a batch with each other, "
                    "and strategy=pipeline sees them in micro-batches; drop this loss or choose another strategy"
                )
    if isinstance(module, Distillation) and module.sampling is not None and module.sampling.source == "student":
        raise ConfigError(
            "loss.sampling.source=student lets the student write token by token, which strategy=pipeline would do one "
            "stage at a time; set loss.sampling.source=teacher or choose another strategy"
        )


def _is_ours(module: Any, method: str) -> bool:
    ours = [getattr(kind, method, None) for kind in (TaskModule, Distillation)]
    return getattr(type(module), method, None) in ours


def check_example(trainer: "pl.Trainer", module: "pl.LightningModule") -> Inputs:
    """Return a small batch of the network's inputs.

    Raises:
        ConfigError: There is none.
    """
    from lightning_opt.callbacks.network import example_of  # callbacks ask about strategies

    return example_of(trainer, module, None)
