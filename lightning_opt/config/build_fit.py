"""From a checked config to what Lightning runs: data, module, callbacks, loggers, trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger

from lightning_opt.callbacks import LogPosition, MetricsCsv, NonFiniteGuard
from lightning_opt.checkpointing import DurableCheckpointIO, MetricState, RngState, SaveCheckpoints, make_resumable
from lightning_opt.config.build import Config, Parts, build_parts, make
from lightning_opt.data import DataModule
from lightning_opt.errors import ConfigError
from lightning_opt.modules import Distillation, Supervised, TaskModule, Teacher, TeacherCache
from lightning_opt.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one fit needs.

    Attributes:
        config: The plain config it was built from.
        folder: Where it writes.
        task: What good means.
        module: Model, losses and optimizer.
        datamodule: Where batches come from.
        trainer: Runs it; holds callbacks, loggers and strategy.
        checkpoints: The callback that keeps last and best.
    """

    config: Config
    folder: Path
    task: Task
    module: TaskModule
    datamodule: pl.LightningDataModule
    trainer: pl.Trainer
    checkpoints: SaveCheckpoints


def build_run(
    config: Config,
    folder: Path,
    *,
    task: Task,
    datamodule: pl.LightningDataModule,
    teachers: Sequence[Teacher] = (),
    cache: TeacherCache | None = None,
    dense: bool = False,
) -> Run:
    """Make the objects of one fit.

    Args:
        config: Checked and plain.
        folder: The fit's own folder, for checkpoints and metrics.
        task: The same object for teacher, control and student.
        datamodule: Likewise.
        teachers: None for a model alone.
        cache: The teachers' stored answers.
        dense: Leave out the callbacks that change the model.

    Raises:
        ConfigError: A class refuses its arguments; the message names the key.
    """
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    module = build_module(config, task, teachers, cache)
    trainer, checkpoints = build_trainer(config, folder, task, dense=dense)
    return Run(
        config=config,
        folder=folder,
        task=task,
        module=module,
        datamodule=datamodule,
        trainer=trainer,
        checkpoints=checkpoints,
    )


def build_data(config: Config) -> pl.LightningDataModule:
    """Make the data module; a stranger's one is given resumable loading."""
    datamodule = make(config["data"], "data")
    if not isinstance(datamodule, pl.LightningDataModule):
        raise ConfigError(f"data._target_={config['data']['_target_']}: this is no LightningDataModule")
    return datamodule if isinstance(datamodule, DataModule) else make_resumable(datamodule, seed=config["seed"])


def build_module(config: Config, task: Task, teachers: Sequence[Teacher], cache: TeacherCache | None) -> TaskModule:
    """Make the LightningModule: a student with teachers, or a model alone."""
    parts = build_parts(config, with_loss=bool(teachers))
    if config.get("compile"):
        parts.model.compile()
    return assemble(parts, task, teachers, cache)


def assemble(parts: Parts, task: Task, teachers: Sequence[Teacher], cache: TeacherCache | None = None) -> TaskModule:
    """Make the LightningModule from its parts.

    Raises:
        ConfigError: The losses do not go together.
    """
    loss = parts.loss
    if loss is None:
        return Supervised(parts.model, task=task, optimizer=parts.optimizer, scheduler=parts.scheduler)
    try:
        return Distillation(
            parts.model,
            list(teachers),
            task=task,
            losses=loss.terms,
            task_weight=loss.task_weight,
            optimizer=parts.optimizer,
            scheduler=parts.scheduler,
            weighting=loss.weighting,
            sampling=loss.sampling,
            cache=cache,
        )
    except ValueError as error:
        raise ConfigError(f"loss: {error}") from error


def build_trainer(
    config: Config, folder: Path, task: Task, *, dense: bool = False
) -> tuple[pl.Trainer, SaveCheckpoints]:
    """Make the trainer with its callbacks, loggers and strategy, and the callback among them that keeps last and best.

    Nothing is written by this: folders are made by the fit.

    Raises:
        ConfigError: A class refuses its arguments; the message names the key.
    """
    checkpoints = _checkpoints(config, folder, task)
    made = [callback for callback in _callbacks(config) if not (dense and changes_model(callback))]
    callbacks = [*made, RngState(), MetricState(), checkpoints]
    loggers, positions = _loggers(config, folder)
    trainer = make(
        config["trainer"],
        "trainer",
        callbacks=[*callbacks, *positions],
        logger=loggers,
        strategy=_strategy(config),
        plugins=[DurableCheckpointIO()],
        default_root_dir=str(folder),
        enable_checkpointing=True,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        use_distributed_sampler=False,
    )
    return trainer, checkpoints


def _checkpoints(config: Config, folder: Path, task: Task) -> SaveCheckpoints:
    node = dict((config.get("callbacks") or {}).get("checkpoints") or {})
    node.setdefault("_target_", "lightning_opt.checkpointing.SaveCheckpoints")
    node.setdefault("monitor", f"val/{task.main_metric}")
    node.setdefault("mode", "max" if task.higher_is_better else "min")
    made = make(node, "callbacks.checkpoints", dirpath=str(folder / "checkpoints"))
    assert isinstance(made, SaveCheckpoints)
    return made


def changes_model(callback: pl.Callback) -> bool:
    """Whether a callback changes the model's form: it says when it is done with that."""
    return hasattr(callback, "is_settled")


def _callbacks(config: Config) -> list[pl.Callback]:
    """Make the user's callbacks, in the order of the config; the guard against NaN is there unless switched off."""
    nodes = {f"callbacks.{name}": node for name, node in (config.get("callbacks") or {}).items()}
    nodes.pop("callbacks.checkpoints", None)
    nodes.setdefault("callbacks.non_finite", {"_target_": "lightning_opt.callbacks.NonFiniteGuard"})
    nodes = {"pruner": config.get("pruner"), "quantizer": config.get("quantizer"), **nodes}
    made = []
    for key, node in nodes.items():
        if not node:
            continue
        made.append(make(node, key))
        if not isinstance(made[-1], pl.Callback):
            raise ConfigError(f"{key}: {type(made[-1]).__name__} is no Lightning callback")
    # The guard looks at the gradients before any other callback edits them.
    return sorted(made, key=lambda callback: not isinstance(callback, NonFiniteGuard))


def _loggers(config: Config, folder: Path) -> tuple[list[Logger], list[pl.Callback]]:
    """Make metrics.csv, which every run has, and what else the user wants."""
    csv = MetricsCsv(folder / "metrics.csv")
    others = [
        make(node, f"logger.{name}", save_dir=str(folder)) if _takes_folder(node) else make(node, f"logger.{name}")
        for name, node in (config.get("logger") or {}).items()
        if node
    ]
    return [csv, *others], [LogPosition(csv)]


def _takes_folder(node: Config) -> bool:
    return "save_dir" not in node and str(node.get("_target_", "")).startswith("lightning.")


def _strategy(config: Config) -> Any:
    node = config.get("strategy")
    return make(node, "strategy") if node else "auto"
