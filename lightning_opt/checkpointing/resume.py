"""Finds the checkpoint from which a run goes on."""

import logging
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_opt.checkpointing.callback import BEST, LAST
from lightning_opt.checkpointing.files import CheckpointDamagedError, manifest_path, read_manifest, verify
from lightning_opt.errors import NoCheckpointError

_log = logging.getLogger(__name__)


def find_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None if none was ever written.

    Order: `last.ckpt`, the versions before it, `best.ckpt`, any other; each damaged one is named in one line of
    warning.

    Args:
        folder: Where `SaveCheckpoints` writes.

    Raises:
        NoCheckpointError: If there were checkpoints and none can be trusted: never a silent fresh start.
    """
    folder = Path(folder)
    damaged = []
    for path in _candidates(folder):
        try:
            verify(path)
        except CheckpointDamagedError as error:
            damaged.append(path.name)
            _warn("%s; trying an older checkpoint", error)
        else:
            return path
    if not damaged:
        return None
    raise NoCheckpointError(
        f"{folder}: no checkpoint can be trusted ({', '.join(damaged)} damaged): restore one, or choose another "
        "run_dir to start from scratch"
    )


def _candidates(folder: Path) -> list[Path]:
    names = {path.name for path in folder.glob("*.ckpt")} | {
        p.name[: -len(".json")] for p in folder.glob("*.ckpt.json")
    }
    paths = [folder / name for name in names if not name.startswith(".")]
    return sorted((path for path in paths if path.exists() or _was_written(path)), key=_age)


def _was_written(path: Path) -> bool:
    """Whether a missing file had been in place: a first save that was killed leaves a manifest and no file."""
    try:
        manifest = read_manifest(path)
    except CheckpointDamagedError:
        return True
    return manifest is not None and (manifest.published or manifest.replaces is not None)


def _age(path: Path) -> tuple[int, int, str]:
    stem = path.name.removesuffix(".ckpt")
    if path.name == LAST:
        return 0, 0, ""
    if stem == "previous" or stem.startswith("previous-"):
        number = stem.removeprefix("previous").removeprefix("-")
        return 1, int(number) if number.isdigit() else 1, path.name
    if path.name == BEST:
        return 2, 0, ""
    return 3, -_step(path), path.name


def _step(path: Path) -> int:
    try:
        manifest = read_manifest(path) if manifest_path(path).exists() else None
    except CheckpointDamagedError:
        return 0
    return manifest.entry.step if manifest is not None else 0


@rank_zero_only
def _warn(message: str, *values: object) -> None:
    _log.warning(message, *values)
