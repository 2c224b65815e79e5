"""The record of one run, `record.json`: make it, write it durably, read it back, change a part of it.

A number that was not measured is null with a reason beside it; NaN and infinity never reach the file.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.reporting.machine import environment
from lightning_opt.reporting.schema import problems, record_schema
from lightning_opt.reporting.text import redact, redact_words

SCHEMA_VERSION = 1
FILE_NAME = "record.json"
MEASURES = tuple(record_schema()["$defs"]["model"]["required"])
_DEPLOYED = tuple(record_schema()["$defs"]["deployed"]["required"][1:])

Record = dict[str, Any]


def new_record(
    command: str | Sequence[str],
    *,
    seed: int | None,
    config_sha256: str | None,
    task_name: str | None = None,
    started: datetime | None = None,
    folder: Path | str = ".",
) -> Record:
    """Start the record of a run that is now running; secrets in the command are masked.

    Args:
        command: The command line, or its words.
        seed: The run's seed.
        config_sha256: Hex digest of the composed config.
        task_name: Names the run in reports.
        started: When the run began; now, if not given. Needs a time zone.
        folder: Where to look for the git commit.
    """
    line = redact(command) if isinstance(command, str) else shlex.join(redact_words(command))
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "running",
        "task_name": task_name,
        "command": line,
        "seed": seed,
        "started": timestamp(started),
        "finished": None,
        "wall_seconds": None,
        **environment(folder),
        "config_sha256": config_sha256,
        "models": {},
        "stages": [],
        "recipe": None,
        "deployed": [],
        "comparison": {},
        "predicted": [],
        "warnings": [],
    }


def timestamp(moment: datetime | None = None) -> str:
    """Write a moment (now, if not given) as ISO 8601 in UTC, to the millisecond."""
    return (moment or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def model_entry(measures: Mapping[str, Any], *, reason: str = "not measured in this run") -> dict[str, Any]:
    """Complete one model's measures: whatever is absent becomes null with a reason.

    Args:
        measures: Any of the record's measures, also `engines` and more specific `reasons`.
        reason: Said of each measure that is null and has no reason of its own.
    """
    return _complete(measures, MEASURES, reason)


def deployed_entry(values: Mapping[str, Any], *, reason: str = "not measured in this run") -> dict[str, Any]:
    """Complete one deployed format's values in the same way as `model_entry`."""
    return _complete(values, _DEPLOYED, reason)


def _complete(values: Mapping[str, Any], names: Sequence[str], reason: str) -> dict[str, Any]:
    entry = {name: values.get(name) for name in names} | dict(values)
    # an empty mapping or list holds no number: that is "not measured" too
    entry |= {name: None for name in names if entry[name] in ({}, [])}
    known = {name: text for name, text in dict(values.get("reasons") or {}).items() if text}
    entry["reasons"] = {name: reason for name in names if has_null(entry[name])} | known
    return entry


def has_null(value: Any) -> bool:
    """Tell whether a measure is null, or holds a null: then it needs a reason."""
    if isinstance(value, Mapping):
        return any(part is None for part in value.values())
    if isinstance(value, list):
        return any(has_null(part) for part in value)
    return value is None


def finish(record: Record, *, status: str = "finished", error: str | None = None) -> Record:
    """Set the status, the end time and the wall time of a record; returns the same record."""
    ended = datetime.now(UTC)
    began = datetime.fromisoformat(record["started"])
    wall_seconds = max(0.0, (ended - began).total_seconds())
    record |= {"status": status, "finished": timestamp(ended), "wall_seconds": wall_seconds}
    if error is not None:
        record["error"] = error
    return record


def write_record(run_dir: Path | str, record: Mapping[str, Any]) -> Path:
    """Check a record and write it durably: after a crash the file is the old one or the new one, whole.

    NaN and infinity become null (with a reason in a model, with a warning elsewhere), and secrets are masked.

    Args:
        run_dir: An existing run folder.
        record: Plain dictionaries, lists, text, numbers, as the published schema asks for.

    Returns:
        The path of `record.json`.

    Raises:
        ConfigError: The record breaks the schema.
        StorageError: The file could not be written; an older one is left as it was.
    """
    clean = _cleaned(record)
    wrong = [str(problem) for problem in problems(clean, record_schema())]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigError(f"the record breaks its schema: {wrong[0]}{more}")
    path = Path(run_dir) / FILE_NAME
    write_durably(path, json.dumps(clean, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def write_durably(path: Path, text: str) -> None:
    """Write text beside its place, sync it, then move it there in one step.

    Raises:
        StorageError: The file could not be written; what was there before is left as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise StorageError(f"cannot write {path}: {reason}; free space or choose another run_dir") from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_record(run_dir: Path | str) -> Record:
    """Read and check the record of a run folder.

    Args:
        run_dir: The run folder, or the `record.json` in it.

    Raises:
        StorageError: There is no record, or it is damaged.
        ConfigError: It was written by a newer version of this package.
    """
    path = Path(run_dir)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        record = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist; name a run folder that holds a {FILE_NAME}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not readable as JSON ({error}); restore it or run again") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this version reads; "
            "upgrade lightning_opt"
        )
    wrong = next(problems(record, record_schema()), None)
    if wrong is not None:
        raise StorageError(f"{path} is damaged: {wrong}; restore it or run again")
    return dict(record)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def update_record(run_dir: Path | str, changes: Mapping[str, Any]) -> Record:
    """Merge changes into the record of a run folder: dictionaries key by key, everything else replaced.

    Returns:
        The whole record as it now is.

    Raises:
        StorageError: There is no readable record, or it could not be written.
        ConfigError: The changed record breaks the schema.
    """
    record = _merged(read_record(run_dir), changes)
    write_record(run_dir, record)
    return record


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, Mapping)):
        return new
    merged = old | {name: _merged(old.get(name), value) for name, value in new.items()}
    if isinstance(merged.get("reasons"), dict):  # a measure that is now known needs no reason any more
        said = merged["reasons"].items()
        merged["reasons"] = {key: why for key, why in said if key not in new or has_null(merged.get(key))}
    return merged


def _cleaned(record: Mapping[str, Any]) -> Record:
    lost: list[str] = []
    clean: Record = _finite(record, "", lost)
    for path in lost:
        owner, name = _reason_place(clean, path.split("."))
        if owner is None:
            clean.setdefault("warnings", []).append(f"{path} was not a finite number and is written as null")
        else:
            owner.setdefault("reasons", {}).setdefault(name, "was not a finite number")
    return clean


def _reason_place(record: Record, steps: list[str]) -> tuple[dict[str, Any] | None, str]:
    """Find the innermost object on a path that keeps reasons (a model, engine, deployed format or the comparison)."""
    found: tuple[dict[str, Any] | None, str] = (None, "")
    node: Any = record
    for step in steps:
        if isinstance(node, dict) and ("reasons" in node or "latency_ms" in node):
            found = (node, step)
        node = node[int(step)] if isinstance(node, list) else node[step]
    return found


def _finite(value: Any, path: str, lost: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(part, f"{path}.{key}" if path else str(key), lost) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{path}.{place}", lost) for place, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(path)
        return None
    return redact(value) if isinstance(value, str) else value
