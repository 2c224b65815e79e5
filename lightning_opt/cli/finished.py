"""Take up a finished run from its folder alone, trusting nothing in it but exact names."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_opt.config.compose import compose_config, plain, read_command_line
from lightning_opt.config.hydra_entry import through_hydra
from lightning_opt.config.paths import import_from_here
from lightning_opt.config.trust import allowed_targets
from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.export import build_trusted, load
from lightning_opt.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run's parts, rebuilt.

    Attributes:
        folder: The run folder.
        model: The student with its best weights, in eval mode.
        task: What good means.
        data: Ready to give test batches.
        config: What the run was started with, as plain values.
    """

    folder: Path
    model: nn.Module
    task: Task
    data: pl.LightningDataModule
    config: dict[str, Any]


def take_up(run_dir: str, *, trusted: Sequence[str], data_values: dict[str, Any] | None = None) -> Finished:
    """Rebuild a run's model, task and data.

    Raises:
        ConfigError: This is no run folder.
        StorageError: A file in it is damaged.
        UntrustedInputError: It names a class that neither the package declares nor the operator trusts.
    """
    folder = Path(run_dir).expanduser()
    place = folder / ".hydra" / "resolved.json"
    if not place.is_file():
        raise ConfigError(f"run_dir={run_dir}: this is no run folder (it has no .hydra/resolved.json)")
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
        nodes = {"task": dict(config["task"]), "data": {**config["data"], **(data_values or {})}}
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{place} is damaged ({error}); restore it from a copy of the run") from error
    allowed = allowed_targets(trusted)
    task = build_trusted(nodes["task"], allowed=allowed)
    data = build_trusted(nodes["data"], allowed=allowed)
    if not isinstance(task, Task) or not isinstance(data, pl.LightningDataModule):
        raise ConfigError(f"run_dir={run_dir}: its task or its data is none")
    data.prepare_data()
    data.setup("test")
    return Finished(
        folder=folder, model=load(folder, trusted_targets=tuple(trusted)), task=task, data=data, config=config
    )


def command(name: str, words: Sequence[str], run: Callable[[dict[str, Any]], int]) -> int:
    """Compose a command's config from its words and run it; `--cfg job` prints it."""
    import_from_here()
    line = read_command_line(words, config_name=name)
    if line.flags:
        return through_hydra(line)
    return run(plain(compose_config(line)))
