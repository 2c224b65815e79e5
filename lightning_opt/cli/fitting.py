"""One fit: go on from the newest good checkpoint, train to the end, take the best weights, judge them."""

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from lightning_opt.checkpointing import DurableCheckpointIO, find_checkpoint, restore_recipes
from lightning_opt.cli.log import log
from lightning_opt.cli.stages import stages_of
from lightning_opt.config.build import Config, build_model
from lightning_opt.config.build_fit import Run, build_run
from lightning_opt.errors import NoCheckpointError
from lightning_opt.modules import TaskModule, Teacher, TeacherCache
from lightning_opt.reporting.record import write_durably
from lightning_opt.tasks import Task

_DONE = "fit.json"
Prepare = Callable[[nn.Module], None]


class Interrupted(Exception):  # noqa: N818 - no error: the run was asked to stop and saved its state
    """A signal asked the run to stop; its state is on disk."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit leaves.

    Attributes:
        model: The best weights, on the CPU, in eval mode.
        quality: Test metrics, the task's main one first.
        best_value: The monitored validation value of the best checkpoint.
        steps: Optimizer steps in all.
        wall_seconds: Of training, over all starts of it that this process saw.
        stages: What callbacks did to the model, as the record's `stages`.
    """

    model: nn.Module
    quality: dict[str, float]
    best_value: float | None
    steps: int
    wall_seconds: float
    stages: list[dict[str, Any]] = field(default_factory=list)


def fit(
    config: Config,
    folder: Path,
    *,
    task: Task,
    datamodule: pl.LightningDataModule,
    teachers: Sequence[Teacher] = (),
    cache: TeacherCache | None = None,
    name: str = "model",
    prepare: Prepare | None = None,
    dense: bool = False,
) -> Fitted:
    """Train and judge one model in its own folder; a fit that is done is read back instead.

    Args:
        config: Checked and plain.
        folder: Holds `checkpoints/`, `metrics.csv` and, when done, `fit.json`.
        task: What good means.
        datamodule: Where batches come from.
        teachers: None for a model alone.
        cache: The teachers' stored answers.
        name: How the log calls the model.
        prepare: Called with the fresh model before its first training, for instance to copy a teacher's layers.
        dense: Leave out the callbacks that change the model: the control.

    Raises:
        Interrupted: A signal asked to stop.
        NoCheckpointError: There were checkpoints and none is good.
    """
    done = folder / _DONE
    if done.is_file():
        return _read_back(config, folder, json.loads(done.read_text(encoding="utf-8")))
    run = build_run(config, folder, task=task, datamodule=datamodule, teachers=teachers, cache=cache, dense=dense)
    resume = find_checkpoint(folder / "checkpoints")
    if prepare is not None and resume is None:
        prepare(run.module.model)
    log.info("%s: %s", name, f"going on from {resume.name}" if resume else f"training in {folder}")
    started = time.monotonic()
    _train(run, resume, name)
    seconds = time.monotonic() - started
    best = _load_final(run)
    fitted = Fitted(
        model=run.module.model.cpu().eval(),
        quality=judge(run.trainer, run.module, run.datamodule),
        best_value=run.checkpoints.best_value,
        steps=run.trainer.global_step,
        wall_seconds=seconds,
        stages=stages_of(run.trainer),
    )
    if run.trainer.is_global_zero:
        _write_done(done, fitted, best)
    log.info("%s: %s after %d steps", name, show(fitted.quality), fitted.steps)
    return fitted


def _train(run: Run, resume: Path | None, name: str) -> None:
    """Fit; a signal that asked to stop has left a checkpoint, and is no error."""
    path = str(resume) if resume else None
    try:
        run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=path, weights_only=True)
    except SIGTERMException as stop:
        raise Interrupted(f"{name}: stopped by a signal at step {run.trainer.global_step}; state saved") from stop
    if run.checkpoints.stopped_by_signal:  # it came during the last step
        raise Interrupted(f"{name}: stopped by a signal at step {run.trainer.global_step}; state saved")


def judge(trainer: pl.Trainer, module: TaskModule, datamodule: pl.LightningDataModule) -> dict[str, float]:
    """Return the test metrics of a module, the main one first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(module, datamodule=datamodule, verbose=False)
    values = {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()}
    main = module.task.main_metric
    module.model.cpu().eval()
    return {main: values.pop(main), **values}


def show(quality: dict[str, float]) -> str:
    """Return the main metric as text."""
    name, value = next(iter(quality.items()))
    return f"test {name} {value:.4f}"


def load_weights(module: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights strictly, after the changes to the structure that it tells of; it is verified first.

    Args:
        module: The LightningModule, or a `ModuleDict` that holds the part of it which is wanted.
        checkpoint: The file.
    """
    saved: dict[str, Any] = DurableCheckpointIO().load_checkpoint(checkpoint)
    restore_recipes(module, saved)
    wanted = tuple(f"{name}." for name in module) if isinstance(module, nn.ModuleDict) else ("",)
    module.load_state_dict({name: value for name, value in saved["state_dict"].items() if name.startswith(wanted)})


def _load_final(run: Run) -> Path:
    """Load what a callback made of the best weights after training, such as a quantized model, else those."""
    callbacks: list[pl.Callback] = run.trainer.callbacks  # type: ignore[attr-defined]
    made = [path for callback in callbacks if (path := getattr(callback, "checkpoint_path", None))]
    best = made[-1] if made else run.checkpoints.best_path or run.checkpoints.last_path
    if best is None or not Path(best).is_file():
        raise NoCheckpointError(f"{run.folder / 'checkpoints'}: training left no checkpoint to take the weights from")
    load_weights(run.module, Path(best))
    return Path(best)


def _write_done(done: Path, fitted: Fitted, best: Path) -> None:
    facts = {
        "quality": fitted.quality,
        "best_value": fitted.best_value,
        "steps": fitted.steps,
        "wall_seconds": fitted.wall_seconds,
        "stages": fitted.stages,
        "weights": best.name,
    }
    write_durably(done, json.dumps(facts, indent=2))


def _read_back(config: Config, folder: Path, facts: dict[str, Any]) -> Fitted:
    model = build_model(config["model"])
    load_weights(nn.ModuleDict({"model": model}), folder / "checkpoints" / facts["weights"])
    return Fitted(
        model=model.eval(),
        quality=facts["quality"],
        best_value=facts["best_value"],
        steps=facts["steps"],
        wall_seconds=facts["wall_seconds"],
        stages=facts.get("stages", []),
    )
