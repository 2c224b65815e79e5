"""Where the configs are, and run folders that no two runs can share."""

import os
import secrets
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from lightning_opt.errors import ConfigError, StorageError


def conf_dir() -> Path:
    """Return the folder of the shipped configs: `conf/` of a checkout, else the one inside the installed package.

    Raises:
        ConfigError: Neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "conf"
    if (checkout / "train.yaml").is_file():
        return checkout
    spec = find_spec("lightning_opt.conf")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "train.yaml").is_file():
            return Path(place)
    raise ConfigError("the configs are missing: reinstall with pip install --force-reinstall lightning_opt")


def cache_dir() -> Path:
    """Return the folder for data, teachers and teacher outputs: `LIGHTNING_OPT_CACHE` or `~/.cache/lightning_opt`."""
    return Path(os.environ.get("LIGHTNING_OPT_CACHE") or Path.home() / ".cache" / "lightning_opt")


def import_from_here() -> None:
    """Let `model._target_=my_pkg.Net` name a module of the folder where the command is given.

    `python train.py` looks in the folder of the script, a console script in that of its own.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def make_run_dir(run_root: str | Path, task_name: str) -> Path:
    """Make a new run folder `run_root/task_name/<date>_<time>-<suffix>` that is this run's alone.

    The folder is created exclusively: of many launches in one second, each gets its own.

    Raises:
        StorageError: The folder cannot be made.
    """
    parent = Path(run_root) / task_name
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{stamp}-{secrets.token_hex(3)}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder.resolve()
    except OSError as error:
        raise StorageError(f"run_root={run_root}: cannot make a run folder there ({error.strerror})") from error


def open_run_dir(path: str | Path) -> Path:
    """Make or reopen the run folder that the user named.

    Raises:
        ConfigError: The folder holds files that are not a run's, so writing into it could lose something.
        StorageError: The folder cannot be made.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and any(folder.iterdir()) and not is_run_dir(folder):
        raise ConfigError(f"run_dir={path} holds other files and no run; name an empty or a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"run_dir={path}: cannot make this folder ({error.strerror})") from error
    return folder.resolve()


def is_run_dir(folder: Path) -> bool:
    """Tell whether a folder is a run's: its first file is always its own config."""
    return (folder / ".hydra" / "config.yaml").is_file() or (folder / ".hydra").is_dir()
