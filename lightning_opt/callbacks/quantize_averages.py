"""Averages of weights beside quantizers: copies of the model that other callbacks keep.

An average of weights has ranges of its own: the average of the weights' ranges covers them, as a norm of a mean is at
most the mean of the norms. Activations are another matter: an average of an integer is none. So quantizers of
activations are those of the model itself, and each average is told after it was updated.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging as Swa
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import nn

from lightning_opt.callbacks.network import find_root
from lightning_opt.errors import ConfigError
from lightning_opt.quantization.state import quantizers, weight_quantizers

Undo = Callable[[], None]


@torch.no_grad()
def follow(root: nn.Module, copy: nn.Module) -> None:
    """Give the quantizers of a copy of `root` what those of `root` know, except for what is averaged rightly."""
    theirs = quantizers(copy)
    for name, quantizer in quantizers(root).items():
        for one, value in quantizer.named_buffers():
            if not (one == "scale" and is_of_weight(name) and quantizer.grid.symmetric):
                theirs[name].get_buffer(one).copy_(value)


@torch.no_grad()
def start_scales(root: nn.Module, copy: nn.Module) -> None:
    """Let learned scales of activations in a copy begin with the values that they have in `root`."""
    theirs = quantizers(copy)
    for name, quantizer in quantizers(root).items():
        if quantizer.learnable and not is_of_weight(name):
            theirs[name].scale.copy_(quantizer.scale)


def is_of_weight(name: str) -> bool:
    """Whether a quantizer is that of a weight, by its name."""
    return name.rpartition(".")[2] == "weight_quantizer"


def keep_following(trainer: "pl.Trainer", root_name: str, root: nn.Module) -> Undo:
    """Have each average follow `root` after each of its updates, and `root` fit its weights once they are an average.

    Returns:
        A function that takes this back.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    wrapped: list[tuple[Any, str]] = []
    for callback in callbacks:
        average: Any = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging) and average is not None:
            copy = find_root(average.module, root_name)[1]
            wrapped.append(_after(average, "update_parameters", partial(follow, root, copy)))
        if isinstance(callback, Swa):
            wrapped.append(_after(callback, "transfer_weights", partial(fit_weights, root)))
            wrapped.append(_after(callback, "reset_momenta", partial(fit_weights, root)))  # batch norms are new

    def undo() -> None:
        for owner, name in wrapped:
            vars(owner).pop(name, None)

    return undo


def _after(owner: Any, name: str, act: Callable[[], None]) -> tuple[Any, str]:
    """Have `act` called after each call of a method of one object."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        act()
        return result

    setattr(owner, name, called)
    return owner, name


@torch.no_grad()
def fit_weights(root: nn.Module) -> None:
    """Find the ranges of weights that are others all at once."""
    for layer, quantizer in weight_quantizers(root):
        if quantizer.enabled and not quantizer.learnable:
            quantizer.fit(layer.deployed_weight()[0])


def watch_weights(root: nn.Module) -> None:
    """Let ranges of weights that are rounded follow the weights, batch by batch."""
    for _, quantizer in weight_quantizers(root):
        quantizer.observing = not quantizer.learnable


def refuse_learned(trainer: "pl.Trainer", root: nn.Module) -> None:
    """Refuse learned scales of weights beside an average that finds the statistics of batch norms anew at the end.

    Raises:
        ConfigError: Naming the callback.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    learned = any(quantizer.learnable for layer, quantizer in weight_quantizers(root) if layer.norm is not None)
    if learned and any(isinstance(callback, Swa) for callback in callbacks):
        raise ConfigError(
            "StochasticWeightAveraging finds the statistics of batch norms anew at the end, and learned scales of the "
            "weights that they are folded into cannot follow: use EMAWeightAveraging, or a scheme without _lsq"
        )
