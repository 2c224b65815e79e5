"""Checks that a run that was stopped and resumed ends exactly like one that was not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_opt.checkpointing import find_checkpoint, load_primitives
from lightning_opt.checkpointing.boundary import observe


@dataclass
class Fit:
    """A run that is ready to fit: what `trainer.fit` takes.

    Args:
        trainer: With a `SaveCheckpoints` that writes into the folder that the maker of this run was given.
        module: The LightningModule.
        data: More arguments of `trainer.fit` (`datamodule=...` or `train_dataloaders=...`).
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    data: dict[str, Any] = field(default_factory=dict)


class Killed(BaseException):
    """Ends a run like a kill between two batches: no hook gets to save anything."""


class KillAfter(pl.Callback):
    """Raises `Killed` once a number of optimizer steps is done and a checkpoint, if one is due, is written.

    Args:
        step: How many steps.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # observed last of all: after the checkpoint of this step
        observe(trainer, before_epoch=lambda: self._observe(trainer))

    def _observe(self, trainer: "pl.Trainer") -> None:
        if trainer.global_step >= self.step:
            raise Killed(f"step {trainer.global_step}")

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._observe(trainer)


def check_resume(
    make_run: Callable[[Path], Fit],
    *,
    folder: Path,
    stop_at_steps: Sequence[int | Sequence[int]],
    checkpoint: str = "last.ckpt",
    ignore: Sequence[str] = (),
) -> None:
    """Run once without a stop, then once for each entry with stops and resumes, and compare the last checkpoints.

    Args:
        make_run: Makes a fresh run that writes its checkpoints into the given folder; also seeds what it must.
        folder: An empty folder to work in.
        stop_at_steps: Optimizer steps after which a run is killed; a sequence stops the same run several times.
        checkpoint: Name of the file to compare.
        ignore: Paths inside the checkpoint, or beginnings of them, that may differ (wall-clock times, say).

    Raises:
        AssertionError: Naming the stops and what differs, or if a run that was stopped early does not differ (then
            the comparison would prove nothing).
    """
    whole = folder / "whole"
    _fit(make_run(whole), resume_from=None)
    for number, stops in enumerate(stop_at_steps):
        steps = [stops] if isinstance(stops, int) else list(stops)
        stopped = folder / f"stopped-{number}"
        for step in steps:
            _kill(make_run(stopped), step, resume_from=find_checkpoint(stopped))
        before = find_checkpoint(stopped)
        if before is not None and not compare_checkpoints(whole / checkpoint, before, ignore=ignore):
            raise AssertionError(f"stop after {steps}: the checkpoint of the stop already equals the end: stop earlier")
        _fit(make_run(stopped), resume_from=before)
        differing = compare_checkpoints(whole / checkpoint, stopped / checkpoint, ignore=ignore)
        if differing:
            raise AssertionError(f"stop after {steps}: {len(differing)} values differ, first: {differing[:8]}")


def compare_checkpoints(first: str | Path, second: str | Path, *, ignore: Sequence[str] = ()) -> list[str]:
    """Return the paths inside two checkpoints at which they are not bit-equal.

    Args:
        first: A checkpoint file.
        second: Another one.
        ignore: Paths, or beginnings of paths, to leave out.
    """
    differing: list[str] = []
    _compare(load_primitives(Path(first)), load_primitives(Path(second)), path="", found=differing)
    return [path for path in differing if not any(path.startswith(one) for one in ignore)]


def _fit(run: Fit, *, resume_from: Path | None) -> None:
    run.trainer.fit(run.module, ckpt_path=resume_from, **run.data)


def _kill(run: Fit, step: int, *, resume_from: Path | None) -> None:
    callbacks: list[pl.Callback] = run.trainer.callbacks  # type: ignore[attr-defined]
    callbacks.insert(0, KillAfter(step))
    try:
        _fit(run, resume_from=resume_from)
    except Killed:
        return
    raise AssertionError(f"the run ended before step {step}")


def _compare(first: Any, second: Any, *, path: str, found: list[str]) -> None:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted({*first, *second}, key=str):
            where = f"{path}.{key}" if path else str(key)
            if key in first and key in second:
                _compare(first[key], second[key], path=where, found=found)
            else:
                found.append(f"{where} (only in one)")
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            _compare(one, other, path=f"{path}[{number}]", found=found)
    elif not _equal(first, second):
        found.append(path)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        # as bytes: equal NaNs are equal, and 0.0 is not -0.0
        return torch.equal(
            first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8)
        )
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    return type(first) is type(second) and bool(first == second)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
