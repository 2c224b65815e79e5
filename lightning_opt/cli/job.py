"""One job, from a checked config to its report."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_opt.checkpointing import signals
from lightning_opt.checkpointing.signals import EndNow, exit_code_after
from lightning_opt.cli import measuring
from lightning_opt.cli.answers import find_cache
from lightning_opt.cli.fitting import Fitted, Interrupted, fit
from lightning_opt.cli.guard import note
from lightning_opt.cli.log import heard, log, log_to_file, start_logging
from lightning_opt.cli.precheck import check_before_fits
from lightning_opt.cli.run_folder import alone_in, claim, is_finished, save_config
from lightning_opt.cli.start import starter
from lightning_opt.cli.teachers import Found, check_match, find_teachers
from lightning_opt.config import launch, ranks
from lightning_opt.config.build import Config, build_task
from lightning_opt.config.build_fit import build_data
from lightning_opt.config.lightning_launch import adapted, join_restartable_group
from lightning_opt.config.paths import make_run_dir, open_run_dir
from lightning_opt.errors import ConfigError
from lightning_opt.reporting import finish, new_record, read_record, write_record
from lightning_opt.reporting.report import render
from lightning_opt.reporting.terminal import summary

Record = dict[str, Any]


def run(config: Config, *, yaml: str, command: Sequence[str], warnings: Sequence[str] = ()) -> Any:
    """Run one job, checked and rehearsed, in its folder and return its objective(s).

    Raises:
        ConfigError: `run_dir` holds a run of another config.
    """
    start_logging()
    folder = _folder(config)
    with claim(folder):
        save_config(folder, config, yaml, command)
        launch.announce(folder)
        if is_finished(folder):
            log.info("%s is finished; its report: %s", folder, folder / "report.html")
            return objective(config, read_record(folder))
        with _taking_part(folder), _logged(folder):
            for warning in warnings:
                log.warning("warning: %s", warning)
            result = _recorded(config, folder, command, warnings)
        ranks.forget(folder)
        return result


def run_as_rank(folder: Path) -> None:
    """Take part in a job as one of its other ranks."""
    start_logging()
    if is_finished(folder):
        return  # rank 0 says so
    config = json.loads((folder / ".hydra" / "resolved.json").read_text(encoding="utf-8"))
    # Rank 0 says how the run ended; a launcher would take another code of this rank for a crash.
    with suppress(Interrupted), _taking_part(folder):
        try:
            _fits(config, folder)
        except Interrupted:
            raise
        except Exception as error:
            note(error)
            raise


@contextmanager
def _taking_part(folder: Path) -> Iterator[None]:
    """Be a rank of the job of a folder, and leave the process as it was."""
    ranks.enter(folder, rank=launch.rank(), processes=launch.processes())
    with launch.job(folder), EndNow(), adapted(folder):
        yield


def prepare(config: Config, *, yaml: str, command: Sequence[str], warnings: Sequence[str] = ()) -> Path:
    """Make the folder of a job that other processes will run, with its config in it.

    Raises:
        ConfigError: `run_dir` holds a run of another config.
    """
    folder = _folder(config)
    with alone_in(folder):
        save_config(folder, config, yaml, command)
        (folder / ".hydra" / "warnings.json").write_text(json.dumps(list(warnings)), encoding="utf-8")
    return folder


def _folder(config: Config) -> Path:
    """Return the folder that was named, or a new one."""
    if config.get("run_dir"):
        return open_run_dir(config["run_dir"])
    launch.check_named(None)
    return launch.announced() or make_run_dir(config["run_root"], config["task_name"])


def _recorded(config: Config, folder: Path, command: Sequence[str], warnings: Sequence[str]) -> Any:
    """Run the stages; whatever happens, the record says how it ended."""
    record = _open_record(config, folder, command, warnings)
    try:
        with heard(record["warnings"]):
            record |= _stages(config, folder)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | Interrupted | SystemExit)
        if not stopped:
            note(error)
        status = "interrupted" if stopped else "failed"
        _leave(folder, finish(record, status=status, error=None if stopped else f"{type(error).__name__}: {error}"))
        if isinstance(error, Interrupted):
            log.info("%s; the same command with run_dir=%s goes on", error, folder)
            sys.exit(exit_code_after(signals.heard()))
        raise
    record = finish(record)
    write_record(folder, record)
    render(folder)
    print(summary(record))
    log.info("report: %s", folder / "report.html")
    return objective(config, record)


def _open_record(config: Config, folder: Path, command: Sequence[str], warnings: Sequence[str]) -> Record:
    """Start the record, or take up the one of a run that was stopped: it began when it first began."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    record = new_record(command, seed=config["seed"], config_sha256=digest, task_name=config["task_name"])
    before: Record = read_record(folder) if (folder / "record.json").is_file() else {}
    record["started"] = before.get("started", record["started"])
    record["warnings"] = list(dict.fromkeys([*before.get("warnings", ()), *warnings]))
    write_record(folder, record)
    return record


def _leave(folder: Path, record: Record) -> None:
    """Write the record and the report of a run that did not end well; nothing that fails here may hide why."""
    for what, write in (("record", lambda: write_record(folder, record)), ("report", lambda: render(folder))):
        try:
            write()
        except Exception as error:  # such as a full disk
            log.warning("the %s could not be written: %s", what, error)
            return


def _stages(config: Config, folder: Path) -> Record:
    """Fit what the config asks for, then measure, export and compare."""
    fitted, found = _fits(config, folder)
    # From here on one process works alone, on the whole test set; the other ranks are done.
    launch.leave_process_group()
    data = build_data(config)
    data.prepare_data()
    return measuring.measure_all(config, folder, fitted, found, data)


def _fits(config: Config, folder: Path) -> tuple[dict[str, Fitted], Found]:
    """Train the teacher where needed, the student alone where asked, and the student; every rank comes through here."""
    task, data = build_task(config), build_data(config)
    check_before_fits(config, task, data)
    found = find_teachers(config)
    check_match(config, found.teachers, data, task)
    cache = find_cache(config, found.teachers, data, task)
    join_restartable_group(config)
    changed = bool(config.get("pruner") or config.get("quantizer"))
    fitted = {}
    if config.get("baseline") and (found.teachers or changed):
        fitted["baseline"] = fit(
            {**config, "teacher": None},
            folder / "baseline",
            task=task,
            datamodule=build_data(config),
            name="dense model alone" if changed else "student alone",
            # What pruning costs shows against the same start; what a teacher is worth, against one without its layers.
            prepare=starter(config, found.teachers if changed else []),
            dense=True,
        )
    fitted["student"] = fit(
        config,
        folder,
        task=task,
        datamodule=data,
        teachers=found.teachers,
        cache=cache,
        name=" ".join(_what_it_is(config, distilled=bool(found.teachers))),
        prepare=starter(config, found.teachers),
    )
    return fitted, found


def _what_it_is(config: Config, *, distilled: bool) -> list[str]:
    """Return how the log calls the model that the run is for."""
    done = [word for key, word in (("pruner", "pruned"), ("quantizer", "quantized")) if config.get(key)]
    return [*done, *(["distilled", "student"] if distilled else ["model"])]


def objective(config: Config, record: Record) -> Any:
    """Return what a sweeper optimises: `objective` names one value of the record or several.

    Names are the test metrics (`test/acc`), the validation value that chose the best weights (`val`), and
    `latency_ms`, `size_bytes`, `params`, `flops` of the student.

    Raises:
        ConfigError: There is no value of that name.
    """
    names = config.get("objective")
    if names is None:
        return None
    student = record["models"].get("student") or {}
    values: dict[str, Any] = {f"test/{name}": value for name, value in (student.get("quality") or {}).items()}
    values |= {name: student.get(name) for name in ("size_bytes", "params", "params_nonzero", "flops")}
    values["latency_ms"] = (student.get("latency_ms") or [{}])[0].get("p50")
    values["val"] = record.get("best_value")
    picked = []
    for name in [names] if isinstance(names, str) else names:
        if values.get(name) is None:
            there = ", ".join(key for key, value in values.items() if value is not None)
            raise ConfigError(f"objective={name}: this run has no such value; it has {there}")
        picked.append(float(values[name]))
    return picked[0] if isinstance(names, str) else tuple(picked)


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Write train.log while the job runs."""
    handler: logging.Handler = log_to_file(folder / "train.log")
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
