"""Stop a job of a sweep that does worse than the others did at the same point."""

import json
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from typing_extensions import override

from lightning_opt.checkpointing import SaveCheckpoints
from lightning_opt.errors import ConfigError, LightningOptError

_TRIAL, _STOPPED = ".hydra/trial.json", ".hydra/pruned.json"


class TrialPruned(LightningOptError):  # noqa: N818 - no error: the sweep asked for it
    """A sweep stopped this job early."""

    exit_code: ClassVar[int] = 0


class StopTrial(pl.Callback):
    """Report the monitored value after each validation, and stop the job when the sweep's pruner says so.

    Acts at the end of each validation of a fit whose folder a sweep has marked as a trial; elsewhere, as in the fit of
    a control, it does nothing. Leaves in a checkpoint how many validations there were, so that a resumed job reports
    the next one. Works with every strategy: rank 0 asks, all ranks stop.

    Args:
        pruner: An `optuna.pruners` object.
        monitor: Name of the logged value; None for the one that chooses the best checkpoint.
    """

    def __init__(self, *, pruner: Any, monitor: str | None = None) -> None:
        self.pruner, self.monitor = pruner, monitor
        self._validations = 0

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.sanity_checking or trainer.state.fn != "fit" or not (folder / _TRIAL).is_file():
            return
        self._validations += 1
        reason = self._judge(trainer, folder) if trainer.is_global_zero else None
        reason = trainer.strategy.broadcast(reason)
        if reason is not None:
            raise TrialPruned(f"pruned: {reason}")

    def _judge(self, trainer: pl.Trainer, folder: Path) -> str | None:
        """Report, and return why the trial is to stop; None where it is not."""
        import optuna

        monitor = self.monitor or _monitored(trainer)
        if monitor not in trainer.callback_metrics:
            raise ConfigError(f"callbacks.stop_trial.monitor={monitor}: nothing of this name was logged")
        value, step = float(trainer.callback_metrics[monitor]), self._validations - 1
        facts = json.loads((folder / _TRIAL).read_text(encoding="utf-8"))
        study = optuna.load_study(study_name=facts["study"], storage=facts["storage"])
        trial = study.trials[facts["number"]]
        if step not in trial.intermediate_values:  # a resumed job may validate once more
            study._storage.set_trial_intermediate_value(trial._trial_id, step, value)
        if not self.pruner.prune(study, study.trials[facts["number"]]):
            return None
        reason = f"{monitor} {value:.6g} after validation {self._validations} is behind the other trials"
        said = {"reason": reason, "validation": self._validations, "value": value, "step": trainer.global_step}
        (folder / _STOPPED).write_text(json.dumps(said, indent=2), encoding="utf-8")
        return reason

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = int(state_dict["validations"])


def _monitored(trainer: pl.Trainer) -> str:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = next((callback.monitor for callback in callbacks if isinstance(callback, SaveCheckpoints)), None)
    if found is None:
        raise ConfigError("callbacks.stop_trial.monitor has no value; name a logged validation value")
    return found
