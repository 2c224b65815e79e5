"""Post-training quantization at the end of a fit: best weights, calibration, improvements, bits under a limit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_opt.callbacks.network import example_of, find_root
from lightning_opt.callbacks.quantize_arguments import What
from lightning_opt.callbacks.quantize_insert import in_dtype_of, warn_of, without_trainer
from lightning_opt.callbacks.quantize_samples import calibration_inputs, check_enough
from lightning_opt.checkpointing import SaveCheckpoints
from lightning_opt.checkpointing.recipe import restore_recipes
from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.state import uncompiled
from lightning_opt.forward import Inputs
from lightning_opt.modules import TaskModule
from lightning_opt.quantization.mixed_precision import MixedPrecision, mixed_precision
from lightning_opt.quantization.post_training import quantize_in_place
from lightning_opt.quantization.scheme import Scheme

NAME = "quantized.ckpt"
_EIGHT = 8


class PostTraining:
    """What happens once training is over.

    Args:
        what: The rules.
        root_name: Where the network is in the LightningModule.
        example_inputs: To trace it with; the data module's when None.
    """

    def __init__(self, what: What, *, root_name: str, example_inputs: Inputs | None) -> None:
        self.what, self.root_name, self.example_inputs = what, root_name, example_inputs
        self._step: int | None = None
        self._samples = 0
        self._mixed: MixedPrecision | None = None

    def check(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refuse before training what could not be done at its end.

        Raises:
            ConfigError: Naming the argument and the value.
        """
        if self.what.scheme.needs_calibration:
            check_enough(trainer, self.what.calibration_samples)
        if self.what.max_drop is None:
            return
        if not trainer.enable_validation:
            raise ConfigError(f"max_drop={self.what.max_drop}: there is no validation data to judge the model on")
        if not self.root_name:
            raise ConfigError(
                f"max_drop={self.what.max_drop}: the LightningModule itself is the network, which cannot be judged in "
                "several versions; put its layers into a module of their own"
            )
        monitored(trainer, pl_module)

    def act(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> str:
        """Quantize the best weights in place, write them down, and return the path of the checkpoint."""
        load_best(trainer, pl_module)
        root = find_root(pl_module, self.root_name)[1]
        inputs = in_dtype_of(root, example_of(trainer, pl_module, self.example_inputs))
        batches = [in_dtype_of(root, batch) for batch in self._batches(trainer, pl_module)]
        training = pl_module.training
        pl_module.eval()
        with uncompiled(root), without_trainer(root):
            scheme = self._chosen_scheme(trainer, pl_module, root, inputs, batches)
            done = quantize_in_place(
                root, inputs, scheme, batches=batches, improve=self.what.improve, exclude=self.what.exclude
            )
        pl_module.train(training)
        warn_of(done.prepared.refused)
        self._step, self._samples = trainer.global_step, done.samples
        path = str(trainer.strategy.broadcast(folder_of(trainer) / NAME))
        trainer.save_checkpoint(path, False)
        return path

    def _chosen_scheme(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        root: nn.Module,
        inputs: Inputs,
        batches: list[Inputs],
    ) -> Scheme:
        """Return the scheme, with more bits for what costs most where the metric is to stay within a limit."""
        scheme = self.what.scheme
        if self.what.max_drop is None:
            return scheme
        metric, is_better_higher = monitored(trainer, pl_module)
        self._mixed = mixed_precision(
            root,
            inputs,
            scheme,
            evaluate=judge(trainer, pl_module, self.root_name, metric),
            max_drop=self.what.max_drop,
            calibration=batches,
            higher_is_better=is_better_higher,
            bits=() if scheme.weight is None or scheme.weight.bits == _EIGHT else (_EIGHT,),
            improve=self.what.improve,
            exclude=self.what.exclude,
        )
        return self._mixed.scheme

    def _batches(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> list[Inputs]:
        reads = self.what.scheme.needs_calibration or self.what.improve or self.what.max_drop is not None
        return calibration_inputs(trainer, pl_module, self.what.calibration_samples) if reads else []

    def stages(self, how: str) -> list[dict[str, Any]]:
        """Return what was done so far, as `{method, from_step, to_step, what}`.

        Args:
            how: The scheme in a few words.
        """
        if self._step is None:
            return []
        data = f", ranges from {self._samples} samples" if self._samples else ""
        told = {"method": "quantize", "from_step": self._step, "to_step": self._step}
        if self._mixed is None:
            return [{**told, "what": f"{how}: post-training quantization{data}"}]
        found = f", {self._mixed.value:.4f} of {self._mixed.reference:.4f} as it was"
        return [{**told, "what": f"{how}: post-training quantization{data}{found}", "layers": self._mixed.table()}]


def judge(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", root_name: str, metric: str
) -> Callable[[nn.Module], float]:
    """Return a function that puts a model in the network's place, validates, and gives one of the metrics."""
    parent, _, child = root_name.rpartition(".")
    holder = pl_module.get_submodule(parent)
    original = getattr(holder, child)

    def evaluate(model: nn.Module) -> float:
        setattr(holder, child, model)
        try:
            return validate(trainer, metric)
        finally:
            setattr(holder, child, original)

    return evaluate


def load_best(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
    """Load the best weights of a fit, else the last ones; without any checkpoint they stay as they are."""
    paths = [getattr(c, name, "") for c in _checkpoints(trainer) for name in ("best_model_path", "last_path")]
    path = next((path for path in paths if path and Path(path).is_file()), None)
    path = trainer.strategy.broadcast(path)
    if path is None:
        return
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    restore_recipes(pl_module, saved)
    pl_module.load_state_dict(saved["state_dict"])


def folder_of(trainer: "pl.Trainer") -> Path:
    """Return the folder of a fit's checkpoints."""
    folders = [getattr(callback, "dirpath", None) for callback in _checkpoints(trainer)]
    found = next((folder for folder in folders if folder), None)
    return Path(found) if found else Path(trainer.default_root_dir) / "checkpoints"


def _checkpoints(trainer: "pl.Trainer") -> list[Any]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = [c for c in callbacks if isinstance(c, SaveCheckpoints)]
    return [*ours, *(c for c in callbacks if isinstance(c, ModelCheckpoint))]


def monitored(trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> tuple[str, bool]:
    """Return the name of the validation metric that judges a model, and whether more of it is better.

    Raises:
        ConfigError: Nothing says which.
    """
    for callback in _checkpoints(trainer):
        if callback.monitor is not None:
            return callback.monitor, callback.mode == "max"
    if isinstance(pl_module, TaskModule):
        return f"val/{pl_module.task.main_metric}", pl_module.task.higher_is_better
    raise ConfigError(
        "max_drop needs to know which validation metric is meant: give a checkpoint callback with monitor=..."
    )


def validate(trainer: "pl.Trainer", metric: str) -> float:
    """Run the validation of a fit once more, with no other callback and no logger, and return one of its metrics.

    Raises:
        ConfigError: The metric is not logged.
    """
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    with alone(trainer):
        loop.run()
    values: Mapping[str, Any] = trainer.callback_metrics
    if metric not in values:
        raise ConfigError(f"monitor={metric!r} was not logged: choose one of {', '.join(sorted(values))}")
    return float(trainer.strategy.broadcast(float(values[metric])))


@contextmanager
def alone(trainer: "pl.Trainer") -> Iterator[None]:
    """Let a trainer validate without its callbacks and loggers."""
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    stage = trainer.state.stage
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    trainer.validating = True
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        trainer.state.stage = stage
