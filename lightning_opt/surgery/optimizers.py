"""Change a model in mid-training and take its optimizers along: moments are cut as the weights are."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_opt.errors import ConfigError
from lightning_opt.surgery.edits import Dims, Edit
from lightning_opt.surgery.model_recipe import record
from lightning_opt.surgery.shrink import cut

# Statistics of whole rows, columns or axes: no part of them belongs to the weights that stay.
_FACTORED = ("row", "col", "precond")
_SHARDED = ("ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer", "FSDPOptimizer")


def apply_with_optimizers(
    model: nn.Module,
    edit: Edit,
    optimizers: Iterable[Optimizer] | Optimizer,
    also: Iterable[nn.Module] = (),
) -> nn.Module:
    """Apply `edit` to `model`, cut the optimizers' states as the parameters are, and write the edit down.

    Parameters stay the same objects, so that groups, schedulers and name tables need no change. Parameters that leave
    the model leave the optimizers too; a group that loses all of them stays, empty, as schedulers count groups. Call it
    between two optimizer steps: gradients are dropped. A `DistributedDataParallel` wrapper has to be made anew.

    Args:
        model: Changed in place.
        edit: Such as a `Shrink` or `DropLayers`.
        optimizers: All that train parameters of `model`.
        also: Copies of the model, or modules that hold one (such as an `AveragedModel`), to be changed alike.

    Returns:
        The model.

    Raises:
        ConfigError: An optimizer's state cannot be cut; nothing has been changed.
        ValueError: The edit does not fit the model; nothing has been changed.
    """
    all_optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    copies = [_copy_inside(holder, model) for holder in also]
    cuts = edit.cuts(model)
    before = dict.fromkeys(model.parameters())
    names = {parameter: name for name, parameter in model.named_parameters()}
    new_states = [_cut_state(optimizer, cuts, names) for optimizer in all_optimizers]
    for copy in copies:
        edit.cuts(copy)
    model = _applied(model, edit)
    for copy in copies:
        _applied(copy, edit)
    left = before.keys() - dict.fromkeys(model.parameters()).keys()
    for optimizer, states in zip(all_optimizers, new_states, strict=True):
        for parameter, values in states:
            optimizer.state[parameter].update(values)
        _forget(optimizer, left)
    return model


def _applied(model: nn.Module, edit: Edit) -> nn.Module:
    changed = edit.apply(model)
    record(changed, edit)
    return changed


def _cut_state(
    optimizer: Optimizer, cuts: Mapping[Tensor, Dims], names: Mapping[nn.Parameter, str]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Return the new state tensors of each parameter that is cut; change nothing."""
    _refuse_whole(optimizer, names)
    return [
        (parameter, dict(_cut_values(optimizer, parameter, dims, names)))
        for parameter, dims in cuts.items()
        if parameter in optimizer.state
    ]


def _cut_values(
    optimizer: Optimizer, parameter: Tensor, dims: Dims, names: Mapping[nn.Parameter, str]
) -> Iterator[tuple[str, Tensor]]:
    for key, value in optimizer.state[parameter].items():
        if not _holds_tensors(value):
            continue
        shape = value.shape if isinstance(value, Tensor) else None
        is_plain = type(value) in (Tensor, nn.Parameter) and not any(part in key for part in _FACTORED)
        if is_plain and shape == parameter.shape:
            yield key, cut(value.detach(), dims)
        elif not (is_plain and value.numel() == 1):
            name = names.get(parameter, "a parameter")  # type: ignore[call-overload]
            held = f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else type(value).__name__
            raise ConfigError(
                f"optimizer: {type(optimizer).__name__} holds {key!r}, a {held}, for {name} of shape "
                f"{tuple(parameter.shape)}; it cannot be cut with the weights, so use one such as AdamW or SGD"
            )


def _refuse_whole(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Refuse optimizers that keep one state for many parameters, or a part of them on each rank."""
    name = type(optimizer).__name__
    kinds = {kind.__name__ for kind in type(optimizer).__mro__}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mine = [parameter for parameter in held if parameter in names]
    if not mine or not (isinstance(optimizer, LBFGS) or kinds & set(_SHARDED)):
        return
    kept = "flattened over all parameters" if isinstance(optimizer, LBFGS) else "spread over the ranks"
    raise ConfigError(
        f"optimizer: {name} keeps its state {kept}, so {names[mine[0]]} of shape {tuple(mine[0].shape)} cannot be cut "
        "or taken out; use one such as AdamW or SGD"
    )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, Tensor)


def _forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    gone = set(parameters)
    for group in optimizer.param_groups:
        if gone.intersection(group["params"]):
            group["params"][:] = [parameter for parameter in group["params"] if parameter not in gone]
    for parameter in gone:
        optimizer.state.pop(parameter, None)


def _copy_inside(holder: nn.Module, model: nn.Module) -> nn.Module:
    """Return the copy of `model` that `holder` is or holds."""
    wanted, kind = _layout(model), type(model)
    found = [m for m in holder.modules() if m is not model and type(m) is kind and _layout(m) == wanted]
    if holder in found or len(found) == 1:
        return holder if holder in found else found[0]
    count = f"{len(found)} copies" if found else "no copy"
    raise ConfigError(
        f"also: {type(holder).__name__} holds {count} of {kind.__name__} with the same parameters and shapes; give the "
        "copy itself"
    )


def _layout(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
