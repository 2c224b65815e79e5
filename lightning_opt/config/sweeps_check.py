"""What can be known to be wrong with a sweep before its first job starts."""

import json
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_opt.config.checks import check
from lightning_opt.config.sweeps_compose import Composer
from lightning_opt.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from lightning_opt.tasks import Task

_MOST_CHECKED, _MOST_BUILT = 64, 16
_ALWAYS = ("val", "size_bytes", "params", "params_nonzero")
_MEASURED = ("latency_ms", "flops")
# Hydra's launchers: where each lies, and what installs it.
_LAUNCHERS = {
    "ray": ("hydra_plugins.hydra_ray_launcher", "hydra-ray-launcher", "ray"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher", "slurm"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "hydra-submitit-launcher", "slurm"),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "hydra-joblib-launcher", "sweep"),
}


def check_space(composer: Composer, objectives: Sequence[str], rehearse: Callable[[dict[str, Any]], None]) -> None:
    """Compose and check the corners of a space: every value of a short list, both ends of an interval.

    Args:
        composer: Of the sweep.
        objectives: What each job must have a value of.
        rehearse: Builds everything of a config once and throws it away.

    Raises:
        ConfigError: The first point that cannot work; its key and value.
    """
    for point in composer.space.corners(_MOST_CHECKED):
        config = composer.config(point)
        check(config)
        _check_measured(objectives, config)
    tasks: set[str] = set()
    for point in composer.space.corners(_MOST_BUILT):
        config = composer.config(point)
        rehearse(config)
        node = json.dumps(config.get("task"), sort_keys=True, default=str)
        if node not in tasks:
            tasks.add(node)
            _check_metrics(objectives, config)


def check_launcher(name: str | None) -> None:
    """Refuse a launcher that is not installed.

    Raises:
        MissingExtraError: With the line that installs it.
        ConfigError: There is none of this name.
    """
    if name is None:
        return
    if name not in _LAUNCHERS:
        raise ConfigError(f"sweep.launcher={name}: there is no such launcher; choose from {', '.join(_LAUNCHERS)}")
    module, package, extra = _LAUNCHERS[name]
    if not _is_there(module):
        raise MissingExtraError(package, extra=extra, needed_for=f"sweep.launcher={name}")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_measured(objectives: Sequence[str], config: dict[str, Any]) -> None:
    for name in objectives:
        if name in _MEASURED and not config.get("benchmark"):
            raise ConfigError(f"objective={name}: it is measured by the benchmark, which is off; drop benchmark=false")
        if name not in (*_ALWAYS, *_MEASURED) and not name.startswith("test/"):
            known = ["test/METRIC", *_ALWAYS, *_MEASURED]
            near = get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise ConfigError(f"objective={name}: no run has such a value; choose from {', '.join(near)}")


def _check_metrics(objectives: Sequence[str], config: dict[str, Any]) -> None:
    """Refuse a test metric that the task does not compute."""
    if not any(name.startswith("test/") for name in objectives):
        return
    known = [f"test/{name}" for name in _metrics(config)] + ["test/loss"]
    for name in objectives:
        if name.startswith("test/") and name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5) or known
            raise ConfigError(f"objective={name}: the task has no such metric; choose from {', '.join(near)}")


def _metrics(config: dict[str, Any]) -> dict[str, Any]:
    return {str(name): metric for name, metric in _task(config).metrics().items()}


def _task(config: dict[str, Any]) -> "Task":
    from lightning_opt.config.build import build_task  # with torch, which a misspelt key need not wait for

    return build_task(config)


def directions_of(
    objectives: Sequence[str], asked: str | Sequence[str] | None, config: dict[str, Any]
) -> tuple[str, ...]:
    """Say for each objective whether more of it is better.

    Args:
        objectives: Their names.
        asked: `sweep.direction`.
        config: Of one job.

    Raises:
        ConfigError: There are more or fewer directions than objectives, or a metric does not say.
    """
    if asked is None:
        return tuple(_direction(name, config) for name in objectives)
    words = [asked] if isinstance(asked, str) else list(asked)
    if len(words) != len(objectives):
        raise ConfigError(f"sweep.direction={','.join(words)}: give one for each of {len(objectives)} objectives")
    return tuple(words)


def _direction(name: str, config: dict[str, Any]) -> str:
    if name == "val":
        mode = ((config.get("callbacks") or {}).get("checkpoints") or {}).get("mode")
        better = mode == "max" if mode else _task(config).higher_is_better
    elif name.startswith("test/"):
        better = _metric_direction(name.removeprefix("test/"), config)
    else:
        better = False
    return "maximize" if better else "minimize"


def _metric_direction(name: str, config: dict[str, Any]) -> bool:
    task = _task(config)
    if name in ("loss", task.main_metric):
        return name != "loss" and bool(task.higher_is_better)
    known = getattr(_metrics(config).get(name), "higher_is_better", None)
    if known is None:
        raise ConfigError(
            f"objective=test/{name}: this metric does not say whether more is better; set sweep.direction"
        )
    return bool(known)
