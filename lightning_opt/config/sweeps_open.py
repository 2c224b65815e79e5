"""From a command line with `-m` to a sweep that is checked and may start."""

import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_opt.config.checks import check
from lightning_opt.config.compose import CommandLine, compose_config, folders_of, plain
from lightning_opt.config.schema import PLAIN
from lightning_opt.config.sweeps import quoted, read_space
from lightning_opt.config.sweeps_check import check_launcher, check_space, directions_of
from lightning_opt.config.sweeps_compose import Composer
from lightning_opt.config.sweeps_plan import Method, Sweep
from lightning_opt.config.sweeps_processes import Processes
from lightning_opt.errors import ConfigError, MissingExtraError
from lightning_opt.reporting.sweeps import FILE_NAME

_log = logging.getLogger("lightning_opt")
_VALIDATION = "val"  # what is optimised unless said otherwise: the test set is for the end


def refuse_alone(line: CommandLine) -> None:
    """Refuse the words of a sweep where there is none.

    Raises:
        ConfigError: `sweep=` or `sweep_dir=` was typed without -m.
    """
    for word in line.overrides:
        key = word.lstrip("+~").partition("=")[0]
        if not line.multirun and (key in ("sweep", "sweep_dir") or key.startswith(("sweep.", "sweep/"))):
            raise ConfigError(f"{word}: this is for a sweep; add -m")


def open_sweep(line: CommandLine, *, program: Sequence[str], rehearse: Callable[[dict[str, Any]], None]) -> Sweep:
    """Read, check and open a sweep.

    Args:
        line: What was typed.
        program: The words before the arguments.
        rehearse: Builds everything of a config once and throws it away.

    Raises:
        ConfigError: Something cannot work; nothing was created.
    """
    own, words = _apart(line)
    first = _first_of(line, words)
    node = _sweep_node(first, own["sweep"])
    space = read_space(words, node.get("params"), folders_of(line))
    composer = Composer(replace(line, overrides=[], multirun=False), space)
    objectives, typed = _objectives(node, first)
    if objectives and not typed:
        space = replace(space, fixed=(*space.fixed, _as_word(objectives)))
        composer = Composer(composer.line, space)
    _log_warnings(objectives)
    check_launcher(node.get("launcher"))
    check_space(composer, objectives, rehearse)
    method = _method(node)
    config = composer.config(space.corners(1)[0])
    sweep = Sweep(
        folder=_folder(own["dir"], first),
        space=space,
        method=method,
        objectives=objectives,
        directions=directions_of(objectives, node.get("direction"), config),
        command=[*program, "-m", *line.overrides],
        composer=composer,
        extra=tuple(f"++callbacks.{name}={_flow(value)}" for name, value in method.callbacks(node).items()),
    )
    method.check(sweep)
    sweep.check_same()
    return sweep


def processes_of(sweep: Sweep, command: list[str]) -> Processes:
    """Return what runs the jobs side by side on this machine."""
    config = sweep.composer.config(sweep.space.corners(1)[0])
    trainer = config.get("trainer") or {}
    devices = trainer.get("devices", 1)
    ranks = len(devices) if isinstance(devices, list) else devices
    ranks = ranks if isinstance(ranks, int) and ranks > 0 else 1
    gpus = 0 if trainer.get("accelerator") == "cpu" or sweep.method.n_jobs == 1 else _gpus()
    return Processes(
        program=command,
        folder=sweep.folder,
        n_jobs=sweep.method.n_jobs,
        ranks=ranks,
        threads=sweep.method.threads,
        gpus=gpus,
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _apart(line: CommandLine) -> tuple[dict[str, Any], list[str]]:
    """Split the overrides into those of the sweep itself and those of its jobs; Hydra's own are left out."""
    own: dict[str, Any] = {"sweep": [], "dir": None}
    words = []
    for word in line.overrides:
        key, _, value = word.lstrip("+~").partition("=")
        if key in ("sweep_dir", "hydra.sweep.dir"):
            own["dir"] = value.strip("'\"")
        elif key == "run_dir":
            raise ConfigError("run_dir names the folder of one run; with -m name that of the sweep: sweep_dir=PATH")
        elif key == "sweep" or key.startswith(("sweep.", "sweep/")):
            own["sweep"].append(word)
        elif not key.startswith(("hydra.", "hydra/")):
            words.append(word)
    return own, words


def _first_of(line: CommandLine, words: Sequence[str]) -> DictConfig:
    """Compose the first point, with the sweep's own words."""
    own, _ = _apart(line)
    space = read_space(words, None, folders_of(line))
    composer = Composer(replace(line, overrides=[], multirun=False), space)
    job = replace(line, overrides=composer.words(space.corners(1)[0]), multirun=False)
    config = compose_config(job)
    if not own["sweep"] and config.get("sweep") is not None:
        return config
    chosen = config.get("sweep") is not None or any(word.partition("=")[0] == "sweep" for word in own["sweep"])
    grid = [] if chosen else ["sweep=grid" if "sweep" in config else "+sweep=grid"]
    return compose_config(replace(job, overrides=[*job.overrides, *grid, *own["sweep"]]))


def _sweep_node(config: DictConfig, words: Sequence[str]) -> dict[str, Any]:
    """Return the checked config of the sweep itself."""
    values = plain(config)
    node = values.get("sweep")
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"sweep={' '.join(words)}: choose from grid, optuna, optuna_pareto")
    if str(node["_target_"]).endswith(".Optuna") and find_spec("optuna") is None:
        raise MissingExtraError("optuna", extra="sweep", needed_for="sweep=optuna")
    if "sweep" in PLAIN[""]:
        check(values)
    return node


def _method(node: dict[str, Any]) -> Method:
    from lightning_opt.config.build import make  # with torch

    made: Method = make(node, "sweep")
    return made


def _objectives(node: dict[str, Any], config: DictConfig) -> tuple[tuple[str, ...], bool]:
    """Return the names of what is optimised, and whether the config names them itself."""
    named = plain(config).get("objective")
    if named is not None:
        return ((named,) if isinstance(named, str) else tuple(named)), True
    if str(node["_target_"]).endswith(".Grid"):
        return (), True
    return tuple(node.get("objectives") or (_VALIDATION,)), False


def _as_word(objectives: Sequence[str]) -> str:
    return f"objective={objectives[0]}" if len(objectives) == 1 else f"objective=[{','.join(objectives)}]"


def _log_warnings(objectives: Sequence[str]) -> None:
    on_test = [name for name in objectives if name.startswith("test/")]
    if on_test:
        _log.warning(
            "warning: objective=%s chooses by the test set, so the best value of it is too good; "
            "objective=val chooses by validation data",
            on_test[0],
        )


def _folder(named: str | None, config: DictConfig) -> Path:
    """Return the sweep's folder: the named one, or a new one where other runs are.

    Raises:
        ConfigError: It holds files and no sweep.
    """
    values = plain(config)
    if named is None:
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(3)}"  # no other sweep of this second has it
        return (Path(values["run_root"]) / values["task_name"] / name).resolve()
    if "${" in named:
        with_name = OmegaConf.merge(config, {"vars": {"_sweep_dir": named}})
        named = str(OmegaConf.select(with_name, "vars._sweep_dir"))
    folder = Path(named).expanduser().resolve()
    others = [path for path in folder.iterdir() if path.name != ".lock"] if folder.is_dir() else []
    if others and not (folder / FILE_NAME).is_file():
        raise ConfigError(f"sweep_dir={named} holds other files and no sweep; name an empty or a new folder")
    return folder


def _flow(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_flow, value))}]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)
