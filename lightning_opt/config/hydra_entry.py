"""What is left to Hydra's own entry point: sweeps, `--cfg job`, `--info`, shell completion."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_opt.config.adopt import adopt_targets
from lightning_opt.config.compose import CommandLine, folders_of, plain, unresolved_yaml
from lightning_opt.config.paths import conf_dir

if TYPE_CHECKING:
    from lightning_opt.config.sweeps_plan import Sweep

RunJob = Callable[[dict[str, Any], str, list[str]], Any]
Rehearse = Callable[[dict[str, Any]], None]


def through_hydra(line: CommandLine) -> int:
    """Let Hydra answer a flag that runs nothing."""
    _hydra_main(line, [*line.flags, *line.overrides], lambda config: None)
    return 0


def sweep(line: CommandLine, *, run_job: RunJob, rehearse: Rehearse) -> int:
    """Run a sweep, or go on with one; nothing starts before its whole space is checked.

    Args:
        line: What was typed.
        run_job: Runs a config, given with its YAML and the words of its own command line, in its folder.
        rehearse: Builds everything of a config once and throws it away.

    Returns:
        0, or the exit code of the first job that did not end well.

    Raises:
        ConfigError: A point of the space cannot work, or the folder holds another sweep.
    """
    # With numpy and more, which a single run's refusal need not wait for.
    from lightning_opt.config.sweeps_compose import without_sweep
    from lightning_opt.config.sweeps_current import current
    from lightning_opt.config.sweeps_open import open_sweep, processes_of

    going = open_sweep(line, program=_program(), rehearse=rehearse)

    def job(config: DictConfig) -> Any:
        words = [word for word in HydraConfig.get().overrides.task if word not in going.extra]
        adopt_targets(config, words, folders_of(line))
        without_sweep(config)
        values = plain(config)
        values["run_dir"] = str(Path(HydraConfig.get().runtime.output_dir).resolve())
        return run_job(values, unresolved_yaml(config), words)

    with going.claimed(), current(going, processes_of(going, _command(line))), _errors_come_through():
        going.write()
        going.method.prepare(going)
        _hydra_main(line, _arguments(line, going), job)
    _render(going)
    return going.exit_code


def _arguments(line: CommandLine, going: "Sweep") -> list[str]:
    """Return what Hydra is called with: the words of each job come from our sweeper."""
    from lightning_opt.config.sweeps import quoted
    from lightning_opt.config.sweeps_current import NAME

    method = going.method
    launcher = method.launcher or (NAME if method.n_jobs > 1 else "basic")
    typed = [word for word in line.overrides if word.lstrip("+").startswith("hydra")]
    ours = [
        "--multirun",
        f"hydra/sweeper={NAME}",
        f"hydra/launcher={launcher}",
        "hydra/job_logging=none",  # a run writes its own log
        "hydra/hydra_logging=none",
        "hydra.output_subdir=null",  # and its own config, without secrets
        f"hydra.sweep.dir={quoted(str(going.folder))}",
    ]
    names = [word.partition("=")[0] for word in typed]
    kept = [word for word in ours if word.partition("=")[0] not in names or word.startswith("hydra.sweep.dir=")]
    return [*kept, *(word for word in typed if not word.startswith("hydra.sweep."))]


def _render(going: "Sweep") -> None:
    """Write the sweep's report; a sweep that went well is not lost to one that cannot be written."""
    import logging

    from lightning_opt.reporting.sweeps_report import render_sweep

    log = logging.getLogger("lightning_opt")
    log.info("sweep: %s", going.summary())
    try:
        log.info("sweep report: %s", render_sweep(going.folder)[0])
    except Exception as error:
        log.warning("the sweep's report could not be written: %s", error)


def _program() -> list[str]:
    """Return the words before the arguments, as a person would type them again."""
    name = Path(sys.argv[0]).name
    return ["python", name] if name == "train.py" else ["lightning-opt", "train"]


def _command(line: CommandLine) -> list[str]:
    """Return what starts one job in a process of its own."""
    name = Path(sys.argv[0])
    program = [str(name.resolve())] if name.name == "train.py" else ["-m", "lightning_opt", "train"]
    flags = {"--config-dir": line.config_dir, "--config-path": line.config_path}
    places = [word for flag, value in flags.items() if value for word in (flag, os.path.abspath(value))]
    named = ["--config-name", line.config_name] if line.config_name != "train" else []
    return [sys.executable, *program, *places, *named]


@contextmanager
def _errors_come_through() -> Iterator[None]:
    """Let Hydra hand on what is raised inside it, where it would print it and exit with 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _hydra_main(line: CommandLine, arguments: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    folder = Path(line.config_path).resolve() if line.config_path else conf_dir()
    before = sys.argv
    extra = ["--config-dir", os.path.abspath(line.config_dir)] if line.config_dir else []
    sys.argv = [before[0], *extra, *arguments]
    try:
        hydra.main(config_path=str(folder), config_name=line.config_name, version_base="1.3")(task)()
    finally:
        sys.argv = before
