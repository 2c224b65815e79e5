"""The network inside a LightningModule, and what it is given."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, map_inputs
from lightning_opt.modules import TaskModule
from lightning_opt.modules.taps import near_names

_EXAMPLES = 2  # a batch of one would let a tracer take its size for a constant
_LABELS = ("labels", "label", "index")


def find_root(pl_module: "pl.LightningModule", module: str | None) -> tuple[str, nn.Module]:
    """Return the name and the network that is changed.

    Without a name it is `pl_module.model` where there is one, else the only child that has parameters, else the
    LightningModule itself. What `torch.compile` wrapped is unwrapped: names are those of the network inside.

    Raises:
        ConfigError: The name is no submodule; the message lists near names.
    """
    name = _guess(pl_module) if module is None else module
    try:
        root = pl_module.get_submodule(name)
    except AttributeError as error:
        names = [one for one, _ in pl_module.named_modules() if one]
        raise ConfigError(
            f"module={module!r} is no part of {type(pl_module).__name__}; near names: "
            f"{', '.join(near_names(name, names)) or 'none'}"
        ) from error
    inner = getattr(root, "_orig_mod", root)
    return name, inner if isinstance(inner, nn.Module) else root


def _guess(pl_module: "pl.LightningModule") -> str:
    if isinstance(getattr(pl_module, "model", None), nn.Module):
        return "model"
    owners = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
    return owners[0] if len(owners) == 1 and not list(pl_module.parameters(recurse=False)) else ""


def example_of(
    trainer: "pl.Trainer", pl_module: "pl.LightningModule", given: Inputs | None, *, samples: int = _EXAMPLES
) -> Inputs:
    """Return inputs of the network, such as it can be traced on, on the module's device.

    They are what the callback was given, else what the data module, the LightningModule or the first training batch
    has. No random state moves.

    Raises:
        ConfigError: There is none.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if given is not None:
        found: Any = given
    elif datamodule is not None and hasattr(datamodule, "example_inputs"):
        found = datamodule.example_inputs(samples)
    elif getattr(pl_module, "example_input_array", None) is not None:
        found = pl_module.example_input_array
    else:
        found = _first_inputs(trainer, pl_module, samples)
    return map_inputs(found, lambda value: value.to(pl_module.device) if isinstance(value, Tensor) else value)


def _first_inputs(trainer: "pl.Trainer", pl_module: "pl.LightningModule", samples: int) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        batch = next(iter(trainer.fit_loop._data_source.dataloader()))
    try:
        return map_inputs(inputs_of(batch, pl_module), lambda value: value[:samples])
    except TypeError as error:
        raise ConfigError(
            f"example_inputs is not given, and a training batch ({type(batch).__name__}) does not say which part of it "
            "the network takes: give the callback example_inputs=..."
        ) from error


def inputs_of(batch: Any, pl_module: "pl.LightningModule") -> Any:
    """Return the part of a batch that the network takes: what the task reads, all but the labels, or the first part."""
    if isinstance(pl_module, TaskModule):
        return pl_module.task.read(batch).inputs
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in _LABELS}
    return batch[0] if isinstance(batch, tuple | list) else batch
