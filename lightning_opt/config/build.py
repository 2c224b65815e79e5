"""From a checked config to the parts that need no Lightning: the only caller of Hydra's instantiate.

Importing Lightning takes longer than all else that a refusal needs. So what a model, a loss or an optimizer has to say
about its arguments comes from here; what Lightning runs is made in `build_fit`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import nn

from lightning_opt.errors import ConfigError, LightningOptError, MissingExtraError
from lightning_opt.losses import OnPolicy, Term
from lightning_opt.losses.schedules import Schedule
from lightning_opt.losses.teachers import TeacherWeights
from lightning_opt.modules.teacher import Teacher

if TYPE_CHECKING:
    from lightning_opt.tasks import Task

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """What a student learns from its teachers by.

    Attributes:
        terms: The weighted losses.
        task_weight: Weight of the loss on labels.
        weighting: How several teachers are combined; None for evenly.
        sampling: Writes sequences in the place of some batches; None for none.
    """

    terms: list[Term]
    task_weight: float | Schedule
    weighting: TeacherWeights | None
    sampling: OnPolicy | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a training module is made of.

    Attributes:
        model: The network that is trained.
        optimizer: Makes an optimizer from parameters.
        scheduler: Makes a learning-rate schedule from an optimizer and `total_steps`; None for a constant rate.
        loss: None for a model alone.
    """

    model: nn.Module
    optimizer: Callable[..., Any]
    scheduler: Callable[..., Any] | None
    loss: LossParts | None


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


def build_parts(config: Config, *, with_loss: bool) -> Parts:
    """Make what a training module is made of; `with_loss` where there are teachers.

    Raises:
        ConfigError: A class refuses its arguments; the message names the key.
    """
    return Parts(
        model=build_model(config["model"]),
        optimizer=make(config["optimizer"], "optimizer"),
        scheduler=make(config["scheduler"], "scheduler") if config.get("scheduler") else None,
        loss=_loss_parts(config) if with_loss else None,
    )


def _loss_parts(config: Config) -> LossParts:
    loss = config["loss"]
    task_weight = loss.get("task_weight", 1.0)
    return LossParts(
        terms=build_terms(loss["terms"]),
        task_weight=make(task_weight, "loss.task_weight") if isinstance(task_weight, dict) else task_weight,
        weighting=build_weighting(config["teacher"]),
        sampling=make(loss["sampling"], "loss.sampling") if loss.get("sampling") else None,
    )


def build_terms(nodes: Config) -> list[Term]:
    """Make the weighted losses; one that is null was switched off on the command line."""
    terms = []
    for name, node in nodes.items():
        if node is None:
            continue
        given = {} if "name" in node else {"name": name}
        terms.append(make(node, f"loss.terms.{name}", **given))
    return terms


def build_task(config: Config) -> "Task":
    """Make the task."""
    from lightning_opt.tasks import Task  # with torchmetrics, which a refused model needs not wait for

    task = make(config["task"], "task")
    if not isinstance(task, Task):
        raise ConfigError(f"task._target_={config['task']['_target_']}: this is no lightning_opt.tasks.Task")
    return task


def build_model(node: Config, key: str = "model") -> nn.Module:
    """Make a network from its config."""
    model = make(node, key)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{key}._target_={node['_target_']}: this is no torch.nn.Module")
    return model


def build_teacher(node: Config, model: nn.Module, name: str = "teacher") -> Teacher:
    """Wrap a trained network as the teacher that a config describes."""
    preprocess = make(node["preprocess"], "teacher.preprocess") if node.get("preprocess") else None
    try:
        return Teacher(
            model,
            preprocess=preprocess,
            dtype=node.get("dtype"),
            compile=bool(node.get("compile")),
            channels_last=bool(node.get("channels_last")),
            placement=node.get("placement"),
            ranks=node.get("ranks"),
            name=name,
        )
    except ValueError as error:
        raise ConfigError(f"teacher: {error}") from error


def build_weighting(node: Config) -> Any:
    """Make the rule by which several teachers are combined; None for evenly."""
    return make(node["weighting"], "teacher.weighting") if node.get("weighting") else None
