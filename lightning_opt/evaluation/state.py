"""Borrow a model for measuring and hand it back as it was."""

import contextlib
from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn


@contextlib.contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put the models into eval mode and restore the mode of each of their modules."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def on_device(device: torch.device | str, *models: nn.Module) -> Iterator[None]:
    """Move the models to `device` and bring each back to the device of its first tensor."""
    homes = [(model, _device_of(model)) for model in models]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model, home in homes:
            if home is not None:
                model.to(home)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Call the modules of a model without what `Module.compile` put before them, which cannot be traced or copied."""
    held = [(part, part._compiled_call_impl) for part in model.modules() if part._compiled_call_impl is not None]
    try:
        for part, _ in held:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in held:
            part._compiled_call_impl = call


def _device_of(model: nn.Module) -> torch.device | None:
    first = next(chain[torch.Tensor](model.parameters(), model.buffers()), None)
    return None if first is None else first.device
