"""What a callback that changes the model owes to the other callbacks of a training.

Averages of weights must not bring pruned weights back; a training must not stop, and no checkpoint must count as best,
before the model has its final form.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks import StochasticWeightAveraging as Swa
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import nn

from lightning_opt.callbacks.network import find_root
from lightning_opt.checkpointing import SaveCheckpoints
from lightning_opt.checkpointing.recipe import restore_recipes
from lightning_opt.pruning.masks import Masks

Undo = Callable[[], None]


def averages(trainer: "pl.Trainer") -> list[nn.Module]:
    """Return the copies of the LightningModule in which other callbacks average its weights."""
    found = [c._average_model for c in _callbacks(trainer) if isinstance(c, WeightAveraging | Swa)]
    return [getattr(copy, "module", copy) for copy in found if isinstance(copy, nn.Module)]


def averaged_roots(trainer: "pl.Trainer", root_name: str) -> list[nn.Module]:
    """Return the copies of the pruned network in which its weights are averaged."""
    copies = [copy for copy in averages(trainer) if isinstance(copy, pl.LightningModule)]
    return [find_root(copy, root_name)[1] for copy in copies]


def mask_averages(trainer: "pl.Trainer", root_name: str, masks: Masks) -> None:
    """Zero in every average what is masked: it still remembers what the weights were."""
    for root in averaged_roots(trainer, root_name):
        masks.apply_to(dict(root.named_parameters()))


def restore_averages(trainer: "pl.Trainer", checkpoint: dict[str, Any]) -> None:
    """Change the structure of averages as the checkpoint's was changed, before their values are restored."""
    for copy in averages(trainer):
        restore_recipes(copy, checkpoint)


def nothing() -> None:
    """Take nothing back."""


def hold_early_stopping(trainer: "pl.Trainer", is_settled: Callable[[], bool]) -> Undo:
    """Let early stopping look at nothing until the model is settled; its patience begins there.

    Returns:
        A function that takes this back.
    """
    stoppers = [callback for callback in _callbacks(trainer) if isinstance(callback, EarlyStopping)]
    for stopper in stoppers:
        _hold(stopper, is_settled)

    def undo() -> None:
        for stopper in stoppers:
            vars(stopper).pop("_should_skip_check", None)

    return undo


def _hold(stopper: EarlyStopping, is_settled: Callable[[], bool]) -> None:
    skips = stopper._should_skip_check

    def skip(trainer: "pl.Trainer") -> bool:
        return not is_settled() or skips(trainer)

    stopper._should_skip_check = skip  # type: ignore[method-assign]


def forget_best_if_settled(trainer: "pl.Trainer") -> None:
    """Let Lightning's checkpoints start anew once no callback is going to change the model: what they call best is not
    pruned yet. No file is deleted.
    """
    if not all(getattr(callback, "is_settled", True) for callback in _callbacks(trainer)):
        return
    for callback in _callbacks(trainer):
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path, callback.best_model_path = "", ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)


def save_soon(trainer: "pl.Trainer") -> None:
    """Have a checkpoint written after this batch: a guard that rolls back could not load one of the old shapes."""
    for callback in _callbacks(trainer):
        if isinstance(callback, SaveCheckpoints):
            callback._due = True


def _callbacks(trainer: "pl.Trainer") -> list[pl.Callback]:
    found: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found
