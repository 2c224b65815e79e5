"""From a checked config to live objects. The only caller of Hydra's instantiate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from torch import nn

from lightning_opt.callbacks import LogPosition, MetricsCsv, NonFiniteGuard
from lightning_opt.checkpointing import DurableCheckpointIO, MetricState, RngState, SaveCheckpoints, make_resumable
from lightning_opt.data import DataModule
from lightning_opt.errors import ConfigError, LightningOptError, MissingExtraError
from lightning_opt.losses import Term
from lightning_opt.modules import Distillation, Supervised, TaskModule, Teacher, TeacherCache
from lightning_opt.tasks import Task

Config = dict[str, Any]


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
) -> Run:
    """Make the objects of one fit.

    Args:
        config: Checked and plain.
        folder: The fit's own folder, for checkpoints and metrics.
        task: The same object for teacher, control and student.
        datamodule: Likewise.
        teachers: None for a model alone.
        cache: The teachers' stored answers.

    Raises:
        ConfigError: A class refuses its arguments; the message names the key.
    """
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    module = build_module(config, task, teachers, cache)
    checkpoints = _checkpoints(config, folder, task)
    callbacks = [*_callbacks(config), RngState(), MetricState(), checkpoints]
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
    return Run(
        config=config,
        folder=folder,
        task=task,
        module=module,
        datamodule=datamodule,
        trainer=trainer,
        checkpoints=checkpoints,
    )


def make(node: Config, key: str, **given: Any) -> Any:
    """Build the object that a config node describes.

    Raises:
        ConfigError: It cannot be built; the message names the key and the class's own words.
    """
    try:
        return instantiate(node, _convert_="all", **given)
    except HydraException as error:
        raise _explained(error, node, key) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _explained(error: BaseException, node: Config, key: str) -> LightningOptError:
    """Return what a class said when it refused, without Hydra's wrapping."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
        if isinstance(cause, LightningOptError):
            return cause
    if isinstance(cause, ModuleNotFoundError):
        package = next((name for name in _EXTRA_OF if name in f"{cause.name} {cause}"), None)
        if package:
            return MissingExtraError(package, extra=_EXTRA_OF[package], needed_for=key)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return ConfigError(f"{key} ({node.get('_target_')}): {lines[0]}")


_EXTRA_OF = {
    "transformers": "text",
    "tokenizers": "text",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "openvino": "openvino",
    "nncf": "openvino",
    "tensorboard": "loggers",
    "mlflow": "loggers",
    "wandb": "loggers",
    "optuna": "sweep",
    "submitit": "slurm",
}


def build_task(config: Config) -> Task:
    """Make the task."""
    task = make(config["task"], "task")
    if not isinstance(task, Task):
        raise ConfigError(f"task._target_={config['task']['_target_']}: this is no lightning_opt.tasks.Task")
    return task


def build_data(config: Config) -> pl.LightningDataModule:
    """Make the data module; a stranger's one is given resumable loading."""
    datamodule = make(config["data"], "data")
    if not isinstance(datamodule, pl.LightningDataModule):
        raise ConfigError(f"data._target_={config['data']['_target_']}: this is no LightningDataModule")
    return datamodule if isinstance(datamodule, DataModule) else make_resumable(datamodule, seed=config["seed"])


def build_model(node: Config, key: str = "model") -> nn.Module:
    """Make a network from its config."""
    model = make(node, key)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{key}._target_={node['_target_']}: this is no torch.nn.Module")
    return model


def build_teacher(node: Config, model: nn.Module, name: str = "teacher") -> Teacher:
    """Wrap a trained network as the teacher that a config describes."""
    preprocess = make(node["preprocess"], "teacher.preprocess") if node.get("preprocess") else None
    return Teacher(model, preprocess=preprocess, dtype=node.get("dtype"), compile=bool(node.get("compile")), name=name)


def build_weighting(node: Config) -> Any:
    """Make the rule by which several teachers are combined; None for evenly."""
    return make(node["weighting"], "teacher.weighting") if node.get("weighting") else None


def build_module(config: Config, task: Task, teachers: Sequence[Teacher], cache: TeacherCache | None) -> TaskModule:
    """Make the LightningModule: a student with teachers, or a model alone."""
    model = build_model(config["model"])
    if config.get("compile"):
        model.compile()
    optimizer = make(config["optimizer"], "optimizer")
    scheduler = make(config["scheduler"], "scheduler") if config.get("scheduler") else None
    if not teachers:
        return Supervised(model, task=task, optimizer=optimizer, scheduler=scheduler)
    loss = config["loss"]
    task_weight = loss.get("task_weight", 1.0)
    return Distillation(
        model,
        list(teachers),
        task=task,
        losses=_terms(loss["terms"]),
        task_weight=make(task_weight, "loss.task_weight") if isinstance(task_weight, dict) else task_weight,
        optimizer=optimizer,
        scheduler=scheduler,
        weighting=build_weighting(config["teacher"]),
        sampling=make(loss["sampling"], "loss.sampling") if loss.get("sampling") else None,
        cache=cache,
    )


def _terms(nodes: Config) -> list[Term]:
    terms = []
    for name, node in nodes.items():
        if node is None:
            continue  # switched off on the command line: loss.terms.kd=null
        given = {} if "name" in node else {"name": name}
        terms.append(make(node, f"loss.terms.{name}", **given))
    return terms


def _checkpoints(config: Config, folder: Path, task: Task) -> SaveCheckpoints:
    node = dict((config.get("callbacks") or {}).get("checkpoints") or {})
    node.setdefault("_target_", "lightning_opt.checkpointing.SaveCheckpoints")
    node.setdefault("monitor", f"val/{task.main_metric}")
    node.setdefault("mode", "max" if task.higher_is_better else "min")
    made = make(node, "callbacks.checkpoints", dirpath=str(folder / "checkpoints"))
    assert isinstance(made, SaveCheckpoints)
    return made


def _callbacks(config: Config) -> list[pl.Callback]:
    """Make the user's callbacks, in the order of the config; the guard against NaN is there unless switched off."""
    nodes = dict(config.get("callbacks") or {})
    nodes.pop("checkpoints", None)
    nodes.setdefault("non_finite", {"_target_": "lightning_opt.callbacks.NonFiniteGuard"})
    made = [make(node, f"callbacks.{name}") for name, node in nodes.items() if node]
    for name, callback in zip([name for name, node in nodes.items() if node], made, strict=True):
        if not isinstance(callback, pl.Callback):
            raise ConfigError(f"callbacks.{name}: {type(callback).__name__} is no Lightning callback")
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


def device_of(trainer: pl.Trainer) -> torch.device:
    """Return where a trainer computes."""
    return trainer.strategy.root_device
