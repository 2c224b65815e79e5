"""Cross-layer equalization: give the channels of neighbouring layers weights of like size."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.quantization.improvement import FloatImprovement, Outcome, first_reasons
from lightning_opt.quantization.layers.base import LayerKind, handler
from lightning_opt.quantization.neighbours import neighbours
from lightning_opt.quantization.rescaling import Neighbours, channels_of, is_norm, rescale
from lightning_opt.quantization.smooth import weight_range


def equalizing_factor(first: Tensor, second: Tensor) -> Tensor:
    """Return what each channel of the first layer is divided by, `(C,)`, so that both layers' ranges become equal.

    Nagel, van Baalen, Blankevoort, Welling (2019), "Data-Free Quantization Through Weight Equalization and Bias
    Correction", arXiv 1906.04721, equation 11: `sqrt(r1 * r2) / r2`. A channel without weights keeps its size.

    Args:
        first: Range of the weights that make each channel, `(C,)`.
        second: Range of the weights that read it, `(C,)`.
    """
    first, second = first.double(), second.double()
    tiny = torch.finfo(torch.float32).tiny
    usable = (first > tiny) & (second > tiny)
    return torch.where(usable, (first * second).sqrt() / second.clamp(min=tiny), 1.0).float()


@dataclass(frozen=True, kw_only=True)
class CrossLayerEqualization(FloatImprovement):
    """Equalize the ranges of weights over neighbouring layers until they do not change any more.

    Nagel et al. (2019), arXiv 1906.04721, section 4.1. Convolutions and linear layers are neighbours if what lies
    between them lets a positive factor through: batch norm, ReLU, pooling and the like; not ReLU6, GELU or SiLU. With
    a batch norm between, the range is that of the weights with the norm folded in. It helps most where a tensor of
    weights has one scale.

    Args:
        rounds: How often all pairs are visited at most.
        tolerance: The visits end when no factor is farther from 1 than this.
        exclude: Patterns (`fnmatch`) of full names of layers whose outputs are left alone.

    Raises:
        ValueError: An argument is out of range.
    """

    rounds: int = 20
    tolerance: float = 1e-3
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")
        if not self.tolerance >= 0.0:
            raise ValueError(f"tolerance must be at least 0, not {self.tolerance}")

    @torch.no_grad()
    def improve(self, model: nn.Module, batches: Sequence[Inputs]) -> Outcome:
        found, refused = neighbours(model, batches[0])
        pairs = [
            group
            for group in found
            if not is_norm(model.get_submodule(group.producer))
            and not any(fnmatchcase(group.producer, one) for one in self.exclude)
        ]
        if not pairs:
            raise ConfigError(
                f"CrossLayerEqualization finds no neighbours in this model ({first_reasons(refused)}); leave it out"
            )
        for _ in range(self.rounds):
            if max([_equalize(model, pair) for pair in pairs]) <= self.tolerance:
                break
        changed = dict.fromkeys(path for pair in pairs for path in (pair.norm or pair.producer, *pair.readers))
        return Outcome(changed=tuple(changed), refused=refused)


def _equalize(model: nn.Module, pair: Neighbours) -> float:
    """Equalize one pair; return how far the farthest factor is from 1."""
    channels = channels_of(model, pair)
    second = torch.stack([weight_range(model.get_submodule(path), channels) for path in pair.readers]).amax(0)
    factor = equalizing_factor(_made_by(model, pair), second)
    rescale(model, pair, factor)
    return float((factor - 1.0).abs().max())


def _made_by(model: nn.Module, pair: Neighbours) -> Tensor:
    """Return the range of the weights that make each channel, with the batch norm folded in, `(C,)`."""
    layer = model.get_submodule(pair.producer)
    axis = cast(LayerKind, handler(layer)).axis
    each = cast(Tensor, layer.weight).detach().float().movedim(axis, 0).flatten(1).abs().amax(1)
    if pair.norm is None:
        return each
    norm = cast(nn.BatchNorm2d, model.get_submodule(pair.norm))
    return each * (norm.weight.float() / torch.sqrt(cast(Tensor, norm.running_var).float() + norm.eps)).abs()
