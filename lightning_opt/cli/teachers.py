"""Find the teachers that a config asks for: in a run folder, in a file, as built, or trained here once and kept."""

import copy
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import lightning_opt
from lightning_opt.cli.fitting import fit
from lightning_opt.config import launch
from lightning_opt.config.build import Config, build_model, build_task, build_teacher
from lightning_opt.config.build_fit import build_data, build_module
from lightning_opt.export import load
from lightning_opt.models import load_weights
from lightning_opt.modules import Distillation, Teacher
from lightning_opt.tasks import Example, Task

# What changes how fast a teacher is trained, not what it becomes.
_NOT_IN_KEY = {"num_workers", "cache_dir", "eval_batch_size"}
_TRAINER_IN_KEY = ("max_epochs", "max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The teachers of a run.

    Attributes:
        teachers: Ready to answer.
        folders: Where those that were trained here are kept, for the curves in the report.
        wall_seconds: Spent on training them, now or when they were first needed.
        steps: Optimizer steps of their training, together.
    """

    teachers: list[Teacher]
    folders: list[Path]
    wall_seconds: float = 0.0
    steps: int = 0


def find_teachers(config: Config) -> Found:
    """Return the teachers of a config; none where it has none.

    Raises:
        ConfigError: A teacher cannot be built or does not fit.
        StorageError: Its files are damaged.
    """
    node = config.get("teacher")
    if not node:
        return Found(teachers=[], folders=[])
    if node.get("run_dir"):
        model = load(Path(node["run_dir"]).expanduser(), trusted_targets=config.get("trusted_targets") or ())
        return Found(teachers=[build_teacher(node, model)], folders=[])
    if node.get("weights"):
        model = build_model(node["model"], "teacher.model")
        load_weights(model, Path(node["weights"]).expanduser())
        return Found(teachers=[build_teacher(node, model)], folders=[])
    if not node.get("train"):
        return Found(teachers=[build_teacher(node, build_model(node["model"], "teacher.model"))], folders=[])
    return _trained(config, node)


def _trained(config: Config, node: Config) -> Found:
    teachers, folders, seconds, steps = [], [], 0.0, 0
    for member in range(node.get("members", 1)):
        recipe = teacher_config(config, member)
        folder = Path(config["paths"]["cache_dir"]).expanduser() / "teachers" / teacher_key(recipe)
        name = "teacher" if node.get("members", 1) == 1 else f"teacher {member + 1}"
        if launch.rank() > 0:
            launch.wait_for_file(folder / "fit.json")  # rank 0 trains it
        with alone(folder), launch.as_one_process():
            inner = find_teachers(recipe)
            fitted = fit(
                recipe,
                folder,
                task=build_task(recipe),
                datamodule=build_data(recipe),
                teachers=inner.teachers,
                name=name,
            )
        teachers.append(build_teacher(node, fitted.model, name))
        folders.append(folder)
        seconds, steps = seconds + fitted.wall_seconds, steps + fitted.steps
    return Found(teachers=teachers, folders=folders, wall_seconds=seconds, steps=steps)


def teacher_config(config: Config, member: int = 0) -> Config:
    """Return the config by which a teacher is trained: the run's own, with the teacher's model and budget.

    A teacher may have a teacher: `teacher.train.teacher` and `teacher.train.loss` make a chain of assistants.
    """
    node = config["teacher"]
    budget = node_of_training(config)
    trainer = copy.deepcopy(config["trainer"])
    if budget.get("max_epochs") or budget.get("max_steps"):
        trainer |= {"max_epochs": budget.get("max_epochs"), "max_steps": budget.get("max_steps") or -1}
    # Trained before the run is spread over devices; the other ranks find it in the cache.
    trainer |= {"devices": 1, "num_nodes": 1}
    seed = (budget.get("seed") or 0) + member
    return {
        **copy.deepcopy(config),
        "model": node["model"],
        "teacher": budget.get("teacher"),
        "loss": budget.get("loss") or {"task_weight": 1.0, "terms": None},
        "pruner": None,
        "quantizer": None,
        "start_from": None,
        "optimizer": budget.get("optimizer") or config["optimizer"],
        "scheduler": budget.get("scheduler") or config.get("scheduler"),
        "data": {**config["data"], **_whole_batch(config), "seed": seed, **(budget.get("data") or {})},
        "trainer": trainer,
        "strategy": None,
        "logger": None,
        "callbacks": {k: v for k, v in (config.get("callbacks") or {}).items() if k in ("progress", "non_finite")},
        "compile": False,
        "baseline": False,
        "seed": seed,
    }


def _whole_batch(config: Config) -> Config:
    """Return the batch size of all devices together: the same run on more devices has the same teacher."""
    devices, size = config["trainer"].get("devices", 1), config["data"].get("batch_size")
    count = len(devices) if isinstance(devices, list) else devices
    if not isinstance(size, int) or not isinstance(count, int) or count < 1:
        return {}
    return {"batch_size": size * count * int(config["trainer"].get("num_nodes") or 1)}


def node_of_training(config: Config) -> Config:
    """Return how the teacher is trained; empty where it is not trained here."""
    node = config["teacher"].get("train")
    return node if isinstance(node, dict) else {}


def teacher_key(recipe: Config) -> str:
    """Return the hash under which a trained teacher is kept: of all that decides what it becomes."""
    facts: dict[str, Any] = {
        name: recipe.get(name) for name in ("task", "model", "teacher", "loss", "optimizer", "scheduler", "seed")
    }
    facts["data"] = {name: value for name, value in recipe["data"].items() if name not in _NOT_IN_KEY}
    facts["trainer"] = {name: recipe["trainer"].get(name) for name in _TRAINER_IN_KEY}
    facts["version"] = lightning_opt.__version__
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def check_match(config: Config, teachers: Sequence[Teacher], datamodule: pl.LightningDataModule, task: Task) -> None:
    """Show a few samples to student, teachers and losses, before time is spent on stored answers and the control.

    Raises:
        ConfigError: They do not fit together: other classes, other tokens, a tap that matches no module.
    """
    if not teachers or not hasattr(datamodule, "example_inputs"):
        return  # a stranger's data is first seen when the student's own training begins
    datamodule.prepare_data()
    datamodule.setup("fit")
    module = build_module(config, task, teachers, None)
    assert isinstance(module, Distillation)
    module.build(Example(inputs=datamodule.example_inputs(2)), vocab_size=getattr(datamodule, "vocab_size", None))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process at a time make what belongs into `folder`; the others then find it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
