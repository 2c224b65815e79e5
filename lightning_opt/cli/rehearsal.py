"""Build everything once before anything is created, so that a class's own refusal comes before a folder exists.

What needs no Lightning and no torchmetrics is built first: importing them takes longer than all the rest of a refusal.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_opt.cli.log import start_logging
from lightning_opt.config import launch
from lightning_opt.config.build import Config, Parts, build_model, build_parts, build_task, build_teacher
from lightning_opt.errors import ConfigError
from lightning_opt.modules.teacher import Teacher

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_opt.tasks import Task

_ANY_NUMBER_OF_STEPS = 1_000_000  # more than any warm-up


def rehearse(config: Config) -> None:
    """Build each part of a run and throw it away.

    Raises:
        ConfigError: A part refuses its arguments; the message names the key.
    """
    _check_device(config["trainer"])
    _check_processes(config["trainer"])
    node = config.get("teacher")
    parts = build_parts(config, with_loss=bool(node))
    teachers = [_teacher(node)] if node else []
    _try_optimizer(parts)
    _rehearse_fit(config, parts, build_task(config), teachers)


def _rehearse_fit(config: Config, parts: Parts, task: "Task", teachers: list[Teacher]) -> None:
    """Build what Lightning runs."""
    from lightning_opt.cli.precheck import check_changes
    from lightning_opt.cli.spread import check_spread
    from lightning_opt.config.build_fit import assemble, build_data, build_trainer

    start_logging()  # again: Lightning's import has set its loggers to its own taste
    if (config.get("export") or {}).get("schemes"):
        from lightning_opt.cli.alternatives import check_schemes

        check_schemes(config)
    datamodule = build_data(config)
    _check_outputs(task, datamodule)
    trainer, _ = build_trainer(config, Path("never-written"), task)
    check_changes(trainer, parts.model)
    check_spread(trainer, teachers, assemble(parts, task, teachers))


def _teacher(node: Config) -> Teacher:
    """Make the teacher untrained; one from a run folder is read when the run has begun, and stands empty here."""
    model = build_model(node["model"], "teacher.model") if node.get("model") else nn.Identity()
    return build_teacher(node, model)


def _check_device(trainer: Config) -> None:
    """Refuse a GPU where there is none."""
    wanted = trainer.get("accelerator")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["gpu"] = any(there.values())
    if wanted in there and not there[wanted]:
        raise ConfigError(
            f"trainer.accelerator={wanted}: torch finds no such device on this machine; set trainer.accelerator=cpu"
        )


def _check_processes(trainer: Config) -> None:
    """Refuse a launcher that started more or fewer processes than the trainer is told of."""
    devices, nodes = trainer.get("devices", 1), int(trainer.get("num_nodes") or 1)
    count = len(devices) if isinstance(devices, list) else devices
    if launch.launched_from_outside() and isinstance(count, int) and count > 0 and count * nodes != launch.processes():
        each = launch.processes() // nodes
        raise ConfigError(
            f"trainer.devices={devices}: the launcher started {launch.processes()} processes; "
            f"set trainer.devices={each} strategy=ddp"
        )


def _try_optimizer(parts: Parts) -> None:
    """Let optimizer and schedule look at their arguments, which they are given when training begins."""
    try:
        optimizer = parts.optimizer([nn.Parameter(torch.zeros(2, 2))])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"optimizer: {error}") from error
    try:
        if parts.scheduler is not None:
            parts.scheduler(optimizer, total_steps=_ANY_NUMBER_OF_STEPS)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"scheduler: {error}") from error


def _check_outputs(task: "Task", datamodule: "pl.LightningDataModule") -> None:
    """Refuse a task that expects another number of classes or tokens than the data has."""
    from lightning_opt.data import DataModule, HuggingFaceDataset

    if not isinstance(datamodule, DataModule) or isinstance(datamodule, HuggingFaceDataset):
        return  # a stranger's data does not say, a hub's would be fetched first; the loss will
    if datamodule.num_outputs != task.num_outputs:
        raise ConfigError(
            f"task.num_outputs={task.num_outputs}: {type(datamodule).__name__} has {datamodule.num_outputs}; "
            f"set task.num_outputs={datamodule.num_outputs}"
        )
