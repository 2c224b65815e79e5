"""What is left to Hydra's own entry point: sweeps, `--cfg job`, `--info`, shell completion."""

import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from lightning_opt.config.adopt import adopt_targets
from lightning_opt.config.checks import check
from lightning_opt.config.compose import (
    CommandLine,
    compose_config,
    folders_of,
    normalise,
    plain,
    unresolved_yaml,
    with_arguments_of_classes,
)
from lightning_opt.config.paths import conf_dir

_MOST_CHECKED = 64
RunOne = Callable[[dict[str, Any], str], Any]


def through_hydra(line: CommandLine) -> int:
    """Let Hydra answer a flag that runs nothing."""
    _hydra_main(line, [*line.flags, *line.overrides], lambda config: None)
    return 0


def sweep(line: CommandLine, *, run_one: RunOne) -> int:
    """Run a sweep: the corners of its grid are checked before its first job starts.

    Raises:
        ConfigError: A combination of the grid cannot work.
    """
    line = with_arguments_of_classes(line)
    for overrides in _grid(line.overrides):
        check(plain(compose_config(CommandLine(**{**vars(line), "overrides": overrides, "multirun": False}))))

    def job(config: DictConfig) -> Any:
        adopt_targets(config, list(HydraConfig.get().overrides.task), folders_of(line))
        values = plain(config)
        values["run_dir"] = str(Path(HydraConfig.get().runtime.output_dir).resolve())
        return run_one(values, unresolved_yaml(config))

    _hydra_main(line, ["--multirun", *_sweep_dir(line.overrides), *line.overrides], job)
    return 0


def _sweep_dir(overrides: Sequence[str]) -> list[str]:
    """Put a sweep's jobs where other runs are, in a folder that no other sweep of the same second can have."""
    if any(word.lstrip("+").startswith("hydra.sweep.dir=") for word in overrides):
        return []
    stamp = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(3)}"
    return [f"hydra.sweep.dir=${{run_root}}/${{task_name}}/{stamp}"]


def _grid(overrides: Sequence[str]) -> list[list[str]]:
    """Return the combinations of a choice sweep; values that a sampler will draw are left at their group's default."""
    parsed = OverridesParser.create().parse_overrides([word for word in overrides if not word.startswith("hydra")])
    choices: list[list[str]] = []
    for override in parsed:
        if not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([normalise(f"{key}={value}") for value in override.sweep_string_iterator()])
    combinations = []
    for combination in product(*choices):
        combinations.append(list(combination))
        if len(combinations) == _MOST_CHECKED:
            break
    return combinations


def _hydra_main(line: CommandLine, arguments: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    folder = Path(line.config_path).resolve() if line.config_path else conf_dir()
    before = sys.argv
    extra = ["--config-dir", os.path.abspath(line.config_dir)] if line.config_dir else []
    sys.argv = [before[0], *extra, *arguments]
    try:
        hydra.main(config_path=str(folder), config_name=line.config_name, version_base="1.3")(task)()
    finally:
        sys.argv = before
