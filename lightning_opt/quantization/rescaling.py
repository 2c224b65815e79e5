"""Divide the channels that a layer makes by positive numbers, and multiply them back in the layers that read them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.evaluation.state import evaluation_mode
from lightning_opt.forward import Inputs, forward
from lightning_opt.pruning.inputs import first_tensor
from lightning_opt.quantization.improvement import Refused
from lightning_opt.quantization.layers.base import handler


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """A producer and all that read its output.

    Attributes:
        producer: Full name of a layer, or of a norm with a weight for each channel.
        norm: Full name of the batch norm between a layer and its readers.
        readers: Full names of the layers that read the channels.
    """

    producer: str
    norm: str | None
    readers: tuple[str, ...]


def is_norm(module: nn.Module) -> bool:
    """Return whether a module seems to scale and shift channels at its end, such as a layer norm."""
    names = {name for name, value in module._parameters.items() if value is not None}
    weight = module._parameters.get("weight")
    if "Norm" not in type(module).__name__ or not names <= {"weight", "bias"} or weight is None:
        return False
    return weight.dim() == 1 and not any(True for _ in module.children())


def channels_of(model: nn.Module, group: Neighbours) -> int:
    """Return how many channels a producer gives."""
    module = model.get_submodule(group.norm or group.producer)
    weight: Any = module.weight
    kind = None if is_norm(module) else handler(module)
    return int(weight.shape[0 if kind is None else kind.axis])


@torch.no_grad()
def rescale(model: nn.Module, group: Neighbours, factor: Tensor) -> None:
    """Divide each channel of a producer by its factor, and multiply it back in what reads it.

    Args:
        model: Holds the layers; changed in place.
        group: Producer and readers.
        factor: Positive, `(channels,)`.

    Raises:
        ValueError: A reader's inputs are no multiple of the channels, or a batch norm has nothing to be scaled by.
    """
    for reader in group.readers:
        reader_scale(model.get_submodule(reader), factor)  # refuses before anything is changed
    module: Any = model.get_submodule(group.norm or group.producer)
    kind = None if is_norm(module) else handler(module)
    if module._parameters.get("weight") is None:
        raise ValueError("its batch norm has no weight to be scaled by")
    parts = [(module.weight, 0 if kind is None else kind.axis)]
    if module._parameters.get("bias") is not None:
        parts.append((module.bias, 0))
    for tensor, axis in parts:
        shape = [1] * tensor.dim()
        shape[axis] = -1
        tensor.copy_(tensor.float() / factor.float().view(shape))
    for reader in group.readers:
        layer: Any = model.get_submodule(reader)
        layer.weight.copy_(layer.weight.float() * reader_scale(layer, factor))


def reader_scale(layer: nn.Module, factor: Tensor) -> Tensor:
    """Return a layer's share of the channels' factors, shaped to multiply its weight.

    Where a layer has several inputs for each channel, as behind a flattened image, they lie next to each other.

    Raises:
        ValueError: The layer's inputs are no multiple of the channels.
    """
    weight: Any = layer.weight
    kind = handler(layer)
    groups = getattr(layer, "groups", 1)
    turned = kind is not None and kind.axis == 1
    inputs = weight.shape[0] if turned else weight.shape[1] * groups
    if inputs % len(factor):
        raise ValueError(f"it has {inputs} inputs for {len(factor)} channels")
    each = factor.float().repeat_interleave(inputs // len(factor))
    if turned:
        return each.view(-1, *[1] * (weight.dim() - 1))
    by_group = each.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
    return by_group.view(*by_group.shape, *[1] * (weight.dim() - 2))


@torch.no_grad()
def check(model: nn.Module, group: Neighbours, inputs: Inputs) -> Refused | None:
    """Scale a group's channels by powers of 2, which loses nothing, and see whether its readers notice.

    Returns:
        None if they do not; the model is as it was in any case.
    """
    draws = torch.randint(-2, 3, (channels_of(model, group),), generator=torch.Generator().manual_seed(0))
    device = next(model.get_submodule(group.producer).parameters()).device
    factor = torch.exp2(draws.to(torch.float32)).to(device)
    held = [model.get_submodule(path) for path in (group.norm or group.producer, *group.readers)]
    before = [{name: value.clone() for name, value in module.named_parameters()} for module in held]
    wanted = _outputs(model, group, inputs)
    try:
        rescale(model, group, factor)
        found = _outputs(model, group, inputs)
        same = all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(wanted, found, strict=True))
    except ValueError as error:
        return Refused(path=group.producer, why=f"{error}")
    finally:
        for module, values in zip(held, before, strict=True):
            for name, value in module.named_parameters():
                value.copy_(values[name])
    if same:
        return None
    return Refused(path=group.producer, why=f"its channels do not reach {group.readers[0]} one by one")


def _outputs(model: nn.Module, group: Neighbours, inputs: Inputs) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output: found.append(output.clone()))
        for path in group.readers
    ]
    try:
        with evaluation_mode(model), torch.random.fork_rng(devices=[]):
            answer = forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    answer = first_tensor(answer)
    return found if answer is None else [*found, answer]
