"""How quantizers come into the network, and into the averages of it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_opt.callbacks.neighbours import averaged_roots
from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.state import uncompiled
from lightning_opt.forward import Inputs, map_inputs
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import quantizers, set_observing
from lightning_opt.surgery import recipe_of, record

Refused = tuple[Any, ...]


def insert(root: nn.Module, inputs: Inputs, scheme: Scheme, *, exclude: Sequence[str]) -> Refused:
    """Insert quantizers, switched off, and return what stays in float although the scheme asks for it.

    Raises:
        ConfigError: The scheme does not fit the network.
    """
    try:
        with uncompiled(root), without_trainer(root), torch.random.fork_rng(devices=[]):
            prepared = prepare(root, in_dtype_of(root, inputs), scheme, exclude=tuple(exclude))
    except ValueError as error:
        raise ConfigError(f"scheme: {error}") from error
    if not prepared.edit.layers:
        why = "; ".join(f"{one.path}: {one.why}" for one in prepared.refused[:4])
        raise ConfigError(
            f"scheme: no layer of {type(root).__name__} can be quantized by it ({why or 'it has none that is known'})"
        )
    _settle(root)
    return tuple(prepared.refused)


def _settle(root: nn.Module) -> None:
    """Let quantizers look at nothing yet, and keep their numbers as exactly as a model in double precision does.

    Lightning restores before it makes the module double: numbers would be cut on the way.
    """
    set_observing(root, False)
    if _dtype_of(root) == torch.float64:
        for quantizer in quantizers(root).values():
            quantizer.double()


def _dtype_of(root: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in root.parameters() if p.is_floating_point()), None)


def in_dtype_of(root: nn.Module, inputs: Inputs) -> Inputs:
    """Return inputs in the floating-point type of the network's parameters, as a trainer's precision gives them."""
    dtype = _dtype_of(root)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    moved: Inputs = map_inputs(inputs, cast)
    return moved


def try_insert(network: nn.Module, inputs: Inputs, scheme: Scheme, *, exclude: Sequence[str]) -> None:
    """Refuse a network that a scheme does not fit; nothing is changed.

    Raises:
        ConfigError: It does not.
    """
    with uncompiled(network), without_trainer(network):
        twin = copy.deepcopy(network)
    insert(twin, inputs, scheme, exclude=exclude)


def insert_into_averages(trainer: "pl.Trainer", root_name: str, root: nn.Module) -> None:
    """Insert the same into the copies of the network that are there already."""
    edit = recipe_of(root).edits[-1]
    for twin in averaged_roots(trainer, root_name):
        if edit not in recipe_of(twin).edits:
            edit.apply(twin)
            record(twin, edit)
            _settle(twin)


def inserted_scheme(root: nn.Module) -> Scheme | None:
    """Return the scheme by which quantizers were inserted before; None if there are none."""
    edits = [edit for edit in recipe_of(root) if edit.op == "quantize"]
    return Scheme.from_dict(edits[-1].to_dict()["scheme"]) if edits else None


def warn_of(refused: Refused) -> None:
    """Say in one warning which layers stay in float, and why."""
    if refused:
        told = "; ".join(f"{one.path}: {one.why}" for one in refused[:8])
        more = f"; and {len(refused) - 8} more" if len(refused) > 8 else ""
        rank_zero_warn(f"{len(refused)} layers stay in float: {told}{more}")


@contextmanager
def without_trainer(root: nn.Module) -> Iterator[None]:
    """Let a LightningModule be copied without the trainer that it knows."""
    held = vars(root).get("_trainer") if isinstance(root, pl.LightningModule) else None
    if held is not None:
        vars(root)["_trainer"] = None
    try:
        yield
    finally:
        if held is not None:
            vars(root)["_trainer"] = held
