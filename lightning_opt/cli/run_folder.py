"""Who owns a run folder, what config it holds, and whether its run is done."""

import fcntl
import json
import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_opt.config.compose import dotted
from lightning_opt.errors import ConfigError
from lightning_opt.reporting import read_record
from lightning_opt.reporting.record import write_durably
from lightning_opt.reporting.text import redact_words

# Where a run writes, and who starts its processes, does not change what it computes.
_NOT_THE_RUN = ("run_dir", "run_root", "launch")


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Own a run folder while in it; a second process that wants the same one is refused.

    Raises:
        ConfigError: Another process is running there.
    """
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise ConfigError(f"run_dir={folder} is in use by {owner}; wait for it or name another folder") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Write into a run folder that nobody runs yet; commands of several machines that prepare the same take turns."""
    (folder / ".hydra").mkdir(exist_ok=True)  # by which the others know that this is a run's folder
    with (folder / ".hydra" / ".prepare").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_finished(folder: Path) -> bool:
    """Tell whether the folder's run ended well."""
    return (folder / "record.json").is_file() and read_record(folder)["status"] == "finished"


def save_config(folder: Path, config: dict[str, Any], yaml: str, command: Sequence[str]) -> None:
    """Write the config beside the run, or check that it is the one already there.

    Raises:
        ConfigError: The folder holds a run of another config; the message names what differs.
    """
    place = folder / ".hydra"
    resolved = place / "resolved.json"
    config = {**config, "run_dir": str(folder)}
    if resolved.is_file():
        before = json.loads(resolved.read_text(encoding="utf-8"))
        differing = _differing(before, config)
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigError(
                f"run_dir={folder} holds a run with other values of {', '.join(differing[:3])}{more}; "
                "give the same command to resume it, or name another folder"
            )
        return
    place.mkdir(exist_ok=True)
    (place / "config.yaml").write_text(yaml, encoding="utf-8")
    # One quoted word a line: these are words of a command line, not YAML of ours.
    overrides = [f"- {json.dumps(word)}\n" for word in redact_words(list(command)[2:])]
    (place / "overrides.yaml").write_text("".join(overrides) or "[]\n", encoding="utf-8")
    (place / "command.txt").write_text(shlex.join(redact_words(list(command))) + "\n", encoding="utf-8")
    write_durably(resolved, json.dumps(config, indent=2, default=str))


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ."""
    keys = dict.fromkeys([*dotted(before), *dotted(now)])
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    plain_now = json.loads(json.dumps(now, default=str))
    return [
        key for key in leaves if key.partition(".")[0] not in _NOT_THE_RUN and _at(before, key) != _at(plain_now, key)
    ]


def _at(node: Any, key: str) -> Any:
    """Return the value at a dotted key; names in it may hold dots themselves, as module patterns do."""
    if not isinstance(node, dict):
        return None
    if key in node:
        return node[key]
    for name, value in node.items():
        if key.startswith(f"{name}.") and isinstance(value, dict):
            found = _at(value, key[len(name) + 1 :])
            if found is not None:
                return found
    return None
