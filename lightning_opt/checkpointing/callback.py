"""When to write checkpoints, and which to keep."""

import itertools
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_opt.checkpointing import together
from lightning_opt.checkpointing.boundary import Notify, complete_fit, continue_exactly, epochs_of, is_finished, observe
from lightning_opt.checkpointing.files import CheckpointDamagedError, keep_a_copy, require_free_space, verify
from lightning_opt.checkpointing.garbage import collect_garbage
from lightning_opt.checkpointing.io import DurableCheckpointIO, sweep_stale_temps
from lightning_opt.checkpointing.loader import ResumableLoader
from lightning_opt.checkpointing.primitives import tensor_bytes, to_primitives
from lightning_opt.checkpointing.sharded_strategy import ShardedCheckpointing
from lightning_opt.checkpointing.signals import SignalFlag
from lightning_opt.errors import ConfigError, NonFiniteError

BEST, LAST = "best.ckpt", "last.ckpt"
_SIGNAL_CHECK_STEPS = 8  # with several ranks: they must agree, and asking costs a synchronisation


class SaveCheckpoints(Checkpoint):
    """Writes `last.ckpt` (the version before it stays as `previous.ckpt`) and `best.ckpt`.

    Acts: between two batches, when everything of the first is done (validation, schedulers, every hook) and nothing of
    the second has begun; at the end of the fit; and on SIGTERM, after which `stopped_by_signal` is set and the fit
    ends with a `SIGTERMException` (exit code 143; none if the signal came in its last step). Nothing is written once
    a `NonFiniteGuard` has tripped or a parameter is not finite. Nothing counts as best while a callback with
    `is_settled` says that it will still change the model. Leaves in a checkpoint: the best value and step, and
    why the fit was to stop. Strategies: all; every rank must have this callback.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: Name of the logged metric that decides what is best; without one no `best.ckpt` is written.
        mode: Whether more (`max`) or less (`min`) is better.
        every_n_steps: Also write each time this many optimizer steps are done.
        every_n_epochs: Write at the end of each such epoch.
        keep: How many versions stay: 2 keeps `last.ckpt` and `previous.ckpt`, more add `previous-2.ckpt`, ...
        signals: After which to write and stop.

    Raises:
        ValueError: If a number is not positive or `mode` is unknown.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        keep: int = 2,
        signals: Sequence[int] = (signal.SIGTERM,),
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more, or null")
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r}: give 'max' or 'min'")
        self.dirpath = Path(dirpath)
        self.monitor, self.mode = monitor, mode
        self.every_n_steps, self.every_n_epochs, self.keep = every_n_steps, every_n_epochs, keep
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.stopped_by_signal: int | None = None
        self._saved_step, self._seen_step = -1, 0
        self._due = self._validated = self._finished = self._last_is_whole = False
        self._between_batches = self._loaded_between_batches = self._value_is_stale = False
        self._signal = SignalFlag(signals)
        self._end: Notify | None = None

    @property
    def last_path(self) -> str:
        """Path of the newest checkpoint, or "" before the first."""
        return self._existing(LAST)

    @property
    def best_path(self) -> str:
        """Path of the best checkpoint, or "" before the first."""
        return self._existing(BEST)

    @property
    def best_model_path(self) -> str:
        """What `ckpt_path="best"` of a trainer stands for."""
        return self.best_path if self.monitor is not None else self.last_path

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Take what a spawned process hands back: nothing to do, the files themselves are looked at."""

    def is_better(self, value: float) -> bool:
        """Whether a monitored value beats the best one; a tie or a number that is not finite does not."""
        if not math.isfinite(value):
            return False
        if self.best_value is None:
            return True
        return value > self.best_value if self.mode == "max" else value < self.best_value

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        source = trainer.fit_loop._data_source.instance
        for loader in source if isinstance(source, list | tuple) else [source]:
            if isinstance(loader, ResumableLoader) and loader.trainer is None:
                loader.trainer = trainer

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value, "best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value, self.best_step = state_dict["best_value"], state_dict["best_step"]

    @override
    def on_save_checkpoint(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: Any) -> None:
        checkpoint["lightning_opt"] = {
            "between_batches": self._between_batches,
            "finished": self._finished,
            "should_stop": bool(trainer.should_stop),
            "limits": [trainer.fit_loop.max_epochs, trainer.fit_loop.max_steps],
        }
        if self._finished and not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            # `max_steps` cut the epoch, and Lightning counts it as done: with more steps it is to go on inside it
            for part in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                part["processed"] = part["completed"] = part["processed"] - 1

    @override
    def on_load_checkpoint(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: Any) -> None:
        said = checkpoint.get("lightning_opt")
        if trainer.state.fn != "fit" or said is None:
            return
        self._loaded_between_batches = said["between_batches"]
        trainer.num_sanity_val_steps = 0  # the uninterrupted run has no second sanity check, whose metrics could stay
        # a run that stopped early has nothing left to do, unless it is now asked to go further
        if said["should_stop"] and said["limits"] == [trainer.fit_loop.max_epochs, trainer.fit_loop.max_steps]:
            trainer.should_stop = True
        if not said["finished"]:
            complete_fit(trainer)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._loaded_between_batches:
            continue_exactly(trainer)
        self._loaded_between_batches = False
        self._due = self._validated = self._finished = self._last_is_whole = False
        self.stopped_by_signal = None
        self._saved_step = self._seen_step = trainer.global_step
        if getattr(trainer, "fast_dev_run", False):
            return
        self._check_before_first_step(trainer)
        self._end = observe(
            trainer, after_batch=lambda: self._after_batch(trainer), after_epoch=lambda: self._after_epoch(trainer)
        )
        self._signal.catch()

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._validated = not trainer.sanity_checking

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._end is not None:
            self._finished = True
            self._save_last(trainer)
            if self._asked_to_stop(trainer, now=True):  # too late for the fit, not for what follows it
                self.stopped_by_signal = self._signal.received or signal.SIGTERM
        self._release()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and self.stopped_by_signal is None:
            self.stopped_by_signal = signal.SIGTERM
        self._release()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._release()

    def _after_batch(self, trainer: "pl.Trainer") -> None:
        loop = trainer.fit_loop.epoch_loop
        if not loop._should_accumulate() and self.every_n_steps:
            self._due |= trainer.global_step // self.every_n_steps > self._seen_step // self.every_n_steps
            self._seen_step = trainer.global_step
        # at the end of an epoch its hooks and schedulers belong into the checkpoint: `_after_epoch` follows
        if loop._should_accumulate() or loop._num_ready_batches_reached():
            return
        if self._validated:
            self._save_if_best(trainer)
        self._save_last_if(trainer, self._due, stop=self._asked_to_stop(trainer))

    def _after_epoch(self, trainer: "pl.Trainer") -> None:
        self._save_if_best(trainer)
        due = self._due or bool(self.every_n_epochs and epochs_of(trainer).processed % self.every_n_epochs == 0)
        self._save_last_if(trainer, due, stop=self._asked_to_stop(trainer, now=True))

    def _save_last_if(self, trainer: "pl.Trainer", due: bool, *, stop: bool) -> None:
        if is_finished(trainer):  # `on_train_end` follows, and what its hooks do belongs into the checkpoint
            return
        if due or stop:
            self._save_last(trainer)
        if stop:
            self._stop(trainer)

    def _save_if_best(self, trainer: "pl.Trainer") -> None:
        validated, self._validated = self._validated, False
        if self.monitor is None or not self._judges_the_final_form(trainer, validated=validated):
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            if validated:
                logged = ", ".join(sorted(metrics))
                raise ConfigError(f"monitor={self.monitor!r} was not logged: choose one of {logged}")
            return
        value = float(metrics[self.monitor])
        if trainer.strategy.broadcast(self.is_better(value)) and self._may_save(trainer):
            self.best_value, self.best_step = trainer.strategy.broadcast(value), trainer.global_step
            self._save(trainer, BEST)

    def _judges_the_final_form(self, trainer: "pl.Trainer", *, validated: bool) -> bool:
        """Whether the monitored value is of a model in its final form: no callback is still going to change it.

        A model that is not pruned yet would win against the pruned one that the run is for.
        """
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not all(getattr(callback, "is_settled", True) for callback in callbacks):
            self._value_is_stale = True
        elif validated or not trainer.enable_validation:
            self._value_is_stale = False
        return not self._value_is_stale

    def _save_last(self, trainer: "pl.Trainer") -> None:
        self._due = False
        if not self._may_save(trainer) or (self._saved_step == trainer.global_step and not self._finished):
            return
        io = trainer.strategy.checkpoint_io
        if isinstance(io, DurableCheckpointIO):
            # Not before the new one is on the disk: where that is full, all versions stay what they are.
            io.before_publish = self._rotate
            try:
                self._save(trainer, LAST)
            finally:
                io.before_publish = None
        else:
            if trainer.is_global_zero:
                self._rotate()
            self._save(trainer, LAST)
        self._saved_step, self._last_is_whole = trainer.global_step, True

    def _save(self, trainer: "pl.Trainer", name: str) -> None:
        self._between_batches = True
        try:
            trainer.save_checkpoint(self.dirpath / name, False)  # everything, not the weights alone
        finally:
            self._between_batches = False

    def _rotate(self) -> None:
        last = self.dirpath / LAST
        if not self._last_is_whole:
            try:  # left by an earlier process: a damaged one must not push out the good one before it
                verify(last)
            except CheckpointDamagedError:
                return
        names = [last, *(self.dirpath / older_name(age) for age in range(1, self.keep))]
        for newer, older in reversed(list(itertools.pairwise(names))):
            keep_a_copy(newer, as_path=older)

    def _may_save(self, trainer: "pl.Trainer") -> bool:
        if any(getattr(callback, "tripped", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return False
        name = first_non_finite(trainer.lightning_module)
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
            raise NonFiniteError(
                f"step {trainer.global_step}: parameter {name or 'of another rank'} is not finite; no checkpoint was "
                "written. Lower the learning rate or clip gradients, and resume"
            )
        return True

    def _check_before_first_step(self, trainer: "pl.Trainer") -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
        to_primitives(checkpoint)
        needed_bytes = 2 * _bytes_of(trainer, checkpoint)
        together.agree(lambda: self._make_room(needed_bytes) if trainer.is_global_zero else None)

    def _make_room(self, needed_bytes: int) -> None:
        sweep_stale_temps(self.dirpath)
        collect_garbage(self.dirpath)
        require_free_space(self.dirpath, needed_bytes=needed_bytes)

    def _asked_to_stop(self, trainer: "pl.Trainer", *, now: bool = False) -> bool:
        if trainer.world_size == 1:
            return self._signal.received is not None
        if not now and trainer.global_step % _SIGNAL_CHECK_STEPS:
            return False
        return trainer.strategy.reduce_boolean_decision(self._signal.received is not None, all=False)

    def _stop(self, trainer: "pl.Trainer") -> None:
        self.stopped_by_signal = self._signal.received or signal.SIGTERM
        # a launcher kills rank 0 when one of its children fails, so only rank 0 says how the run ended
        raise SIGTERMException(128 + self.stopped_by_signal if trainer.local_rank == 0 else 0)

    def _release(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None
        self._signal.release()

    def _existing(self, name: str) -> str:
        path = self.dirpath / name
        return str(path) if path.exists() else ""


def _bytes_of(trainer: "pl.Trainer", checkpoint: dict[str, Any]) -> int:
    """Return the size of a checkpoint once the optimizer has its moments; all ranks call it."""
    trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
    moments = 0 if trainer.global_step else 2 * tensor_bytes(trained)
    if isinstance(trainer.strategy, ShardedCheckpointing):
        return trainer.strategy.checkpoint_bytes(checkpoint) + sum(together.gather(moments))
    return tensor_bytes(checkpoint) + moments


def older_name(age: int) -> str:
    """Return the name of the version that is `age` saves older than `last.ckpt`."""
    return "previous.ckpt" if age == 1 else f"previous-{age}.ckpt"


def first_non_finite(module: torch.nn.Module) -> str | None:
    """Return the name of the first parameter with a NaN or an infinity, or None (one host sync if all is well)."""
    named = [(n, p.detach()) for n, p in module.named_parameters() if p.is_floating_point() and p.numel()]
    if not named:
        return None
    norms = torch._foreach_norm([getattr(p, "_local_tensor", p) for _, p in named], 2)
    if bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all()):
        return None
    # the norm of very large but finite values may overflow: only then is each value looked at
    return next((name for name, p in named if not bool(torch.isfinite(getattr(p, "_local_tensor", p)).all())), None)
