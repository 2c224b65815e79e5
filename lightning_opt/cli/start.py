"""Where a model's first weights come from: an earlier run, a file, or its teacher."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lightning_opt.cli.fitting import Prepare
from lightning_opt.cli.log import log
from lightning_opt.config.build import Config
from lightning_opt.errors import ConfigError
from lightning_opt.export import load
from lightning_opt.models import load_weights
from lightning_opt.modules import Teacher, initialise_from_teacher
from lightning_opt.surgery import recipe_of, replay


def starter(config: Config, teachers: Sequence[Teacher]) -> Prepare | None:
    """Return what gives a fresh model its first weights before training; None where they stay as drawn."""
    mapping = (config.get("teacher") or {}).get("init_student")
    if mapping and teachers:
        return lambda model: _from_teacher(model, teachers[0].model, mapping)
    source = config.get("start_from")
    if not source:
        return None
    path = Path(source).expanduser()
    if path.is_file():
        return lambda model: _from_file(model, path)
    return lambda model: _from_run(model, path, config.get("trusted_targets") or ())


def _from_teacher(model: nn.Module, teacher: nn.Module, mapping: dict[str, str]) -> None:
    copied = initialise_from_teacher(model, teacher, mapping)
    log.info("student: %d tensors start from the teacher's", len(copied))


def _from_file(model: nn.Module, path: Path) -> None:
    load_weights(model, path)
    log.info("model: starts from %s", path)


def _from_run(model: nn.Module, path: Path, trusted_targets: Sequence[str]) -> None:
    """Copy the weights of an artifact, after the same changes to the structure."""
    source = load(path, trusted_targets=trusted_targets)
    try:
        replay(model, recipe_of(source))
        model.load_state_dict(source.state_dict())
    except (ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[:2]
        raise ConfigError(f"start_from={path}: it holds another model than model= builds: {' '.join(first)}") from error
    log.info("model: starts from %s", path)
