"""Linear layers, and transformers' `Conv1D`, which is one with its weight the other way round."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.quantization.layers.base import LOOKUPS, LayerKind, handler


@handler.register
def _linear(module: nn.Linear) -> LayerKind:
    return _LINEAR


def _compute(module: nn.Module, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(input, weight, bias)


_LINEAR = LayerKind(name="linear", layer=nn.Linear, compute=_compute)


def _conv1d_of_transformers(module: nn.Module) -> LayerKind | None:
    """Know the class by its name: transformers is not imported before a model of its is met."""
    for kind in type(module).__mro__:
        if (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D"):
            return LayerKind(name="linear", layer=kind, compute=_compute_turned, axis=1)
    return None


def _compute_turned(module: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = torch.addmm(bias, x.view(-1, x.size(-1)), weight)
    return rows.view((*x.size()[:-1], module.nf))


LOOKUPS.append(_conv1d_of_transformers)
