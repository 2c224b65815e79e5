"""Build everything once before anything is created, so that a class's own refusal comes before a folder exists."""

from pathlib import Path

import lightning.pytorch as pl

from lightning_opt.config.build import (
    Config,
    _terms,
    build_data,
    build_model,
    build_run,
    build_task,
    build_teacher,
    build_weighting,
    make,
)
from lightning_opt.data import DataModule, HuggingFaceDataset
from lightning_opt.errors import ConfigError
from lightning_opt.tasks import Task


def rehearse(config: Config) -> None:
    """Build each part of a run and throw it away.

    Raises:
        ConfigError: A part refuses its arguments; the message names the key.
    """
    task, datamodule = build_task(config), build_data(config)
    _check_outputs(task, datamodule)
    # Nothing is written by building: folders are made by the fit.
    build_run({**config, "teacher": None}, Path("never-written"), task=task, datamodule=datamodule)
    node = config.get("teacher")
    if not node:
        return
    _terms(config["loss"]["terms"])
    build_weighting(node)
    if config["loss"].get("sampling"):
        make(config["loss"]["sampling"], "loss.sampling")
    if node.get("model"):
        build_teacher(node, build_model(node["model"], "teacher.model"))


def _check_outputs(task: Task, datamodule: pl.LightningDataModule) -> None:
    """Refuse a task that expects another number of classes or tokens than the data has."""
    if not isinstance(datamodule, DataModule) or isinstance(datamodule, HuggingFaceDataset):
        return  # a stranger's data does not say, a hub's would be fetched first; the loss will
    if datamodule.num_outputs != task.num_outputs:
        raise ConfigError(
            f"task.num_outputs={task.num_outputs}: {type(datamodule).__name__} has {datamodule.num_outputs}; "
            f"set task.num_outputs={datamodule.num_outputs}"
        )
