"""Handle each model in a process of its own, forked from one that has only imported."""

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def run_each(work: Callable[[str, Path], None], *, seconds: Callable[[str], int]) -> None:
    """Call `work(name, folder / name)` for each name of the command line `folder name ...`, each in a fork.

    What it raises, or that it took more than `seconds(name)` of CPU time, is written to `folder / name / SCRIPT.error`.
    """
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    context = multiprocessing.get_context("fork")
    for name in names:
        place = folder / name
        place.mkdir(exist_ok=True)
        process = context.Process(target=_guarded, args=(work, name, place, seconds(name)))
        process.start()
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            _error_file(place).write_text(f"takes more than {seconds(name)} s of CPU time")
        elif process.exitcode and not _error_file(place).exists():
            _error_file(place).write_text(f"ended with exit code {process.exitcode}")


def _guarded(work: Callable[[str, Path], None], name: str, place: Path, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    try:
        work(name, place)
    except Exception as error:  # the study reports it
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0][:200]
        _error_file(place).write_text(f"{type(error).__name__}: {first}")
        os._exit(1)


def _error_file(place: Path) -> Path:
    return place / f"{Path(sys.argv[0]).stem}.error"
