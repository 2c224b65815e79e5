"""SmoothQuant: move the outliers of activations into weights, which are easier to round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.quantization.improvement import FloatImprovement, Outcome, first_reasons
from lightning_opt.quantization.layers.base import handler
from lightning_opt.quantization.layerwise import Stage, inputs_of
from lightning_opt.quantization.neighbours import neighbours
from lightning_opt.quantization.rescaling import Neighbours, channels_of, rescale

_LEAST = 1e-5


def smoothing_factor(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return what each channel of activations is divided by, `(C,)`.

    Xiao, Lin, Seznec, Wu, Demouth, Han (2022), "SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models", arXiv 2211.10438, equation 4: `max|X_j|^alpha / max|W_j|^(1 - alpha)`. A channel without
    values or without weights keeps its size.

    Args:
        activation: Largest magnitude of each channel, `(C,)`.
        weight: Largest magnitude of the weights that it meets, `(C,)`.
        alpha: How much of the difficulty goes into the weights, from 0 to 1.
    """
    activation, weight = activation.double(), weight.double()
    factor = activation.pow(alpha) / weight.pow(1.0 - alpha)
    usable = (activation > _LEAST) & (weight > _LEAST)
    return torch.where(usable, factor, 1.0).float()


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(FloatImprovement):
    """Divide the channels of activations that layers read by `smoothing_factor`, and multiply their weights by it.

    Xiao et al. (2022), arXiv 2211.10438. The division is done where the channels are made: in the weight and bias of
    the norm, or of the layer (or its batch norm), that comes before. A norm whose output is also read by a residual
    addition, as in post-norm transformers, cannot take it and is left alone.

    Args:
        alpha: How much of the difficulty goes into the weights, from 0 to 1.
        exclude: Patterns (`fnmatch`) of full names of norms and layers whose output is left alone.

    Raises:
        ValueError: An argument is out of range.
    """

    alpha: float = 0.5
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be from 0 to 1, not {self.alpha}")

    @torch.no_grad()
    def improve(self, model: nn.Module, batches: Sequence[Inputs]) -> Outcome:
        found, refused = neighbours(model, batches[0])
        groups = [group for group in found if not any(fnmatchcase(group.producer, one) for one in self.exclude)]
        if not groups:
            raise ConfigError(
                f"SmoothQuant finds nothing to smooth in this model ({first_reasons(refused)}); leave it out"
            )
        largest = _largest_inputs(model, groups, batches)
        for group in groups:
            channels = channels_of(model, group)
            activation = torch.stack([_by_channel(largest[path], channels) for path in group.readers]).amax(0)
            weight = torch.stack([weight_range(model.get_submodule(path), channels) for path in group.readers]).amax(0)
            rescale(model, group, smoothing_factor(activation, weight, self.alpha))
        changed = dict.fromkeys(path for group in groups for path in (group.norm or group.producer, *group.readers))
        return Outcome(changed=tuple(changed), refused=refused)


def weight_range(layer: nn.Module, channels: int) -> Tensor:
    """Return the largest magnitude of a layer's weights for each channel that it reads, `(channels,)`."""
    kind, groups = handler(layer), getattr(layer, "groups", 1)
    weight = cast(Tensor, layer.weight).detach().abs().float()
    if kind is not None and kind.axis == 1:
        return _by_channel(weight.flatten(1).amax(1), channels)
    by_group = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    each = by_group.amax(-1).unflatten(0, (groups, -1)).amax(1)  # (groups, inputs of each)
    return _by_channel(each.flatten(), channels)


def _by_channel(each: Tensor, channels: int) -> Tensor:
    """Take the largest of the inputs that belong to one channel; they lie next to each other."""
    return each.view(channels, -1).amax(1)


def _largest_inputs(model: nn.Module, groups: Sequence[Neighbours], batches: Sequence[Inputs]) -> Mapping[str, Tensor]:
    """Return the largest magnitude of each input of each reader, `(inputs,)`, over all batches."""
    paths = tuple(dict.fromkeys(path for group in groups for path in group.readers))
    found: dict[str, Tensor] = {}
    for batch in batches:
        for path, given in inputs_of(model, Stage(paths, len(paths)), batch).items():
            for x in given:
                largest = _largest(x, model.get_submodule(path))
                found[path] = torch.maximum(found[path], largest) if path in found else largest
    return found


def _largest(x: Tensor, layer: nn.Module) -> Tensor:
    kernel = len(getattr(layer, "kernel_size", ()))
    channels_last = x.movedim(-1 - kernel, -1) if kernel else x
    return channels_last.reshape(-1, channels_last.shape[-1]).abs().amax(0).float()
