"""How many parameters a model has, how many of them are not zero, and how many bytes its state takes.

A tensor that is used under two names (tied embeddings) counts once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One module's own tensors, without those of its children."""

    name: str
    kind: str
    params: int
    params_nonzero: int
    bytes: int


def count_parameters(model: nn.Module) -> int:
    """Count the parameters of `model`, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Count the parameters of `model` that are not exactly zero, tied ones once."""
    return sum(int(torch.count_nonzero(parameter.detach())) for parameter in model.parameters())


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each distinct tensor of the state dict with its first name."""
    seen: set[tuple[object, ...]] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            continue
        identity = _identity(value)
        if identity not in seen:
            seen.add(identity)
            yield name, value.detach()


def bytes_by_dtype(model: nn.Module) -> dict[str, int]:
    """Sum the bytes of the state dict for each dtype, such as `{"float32": 4096}`; tied tensors count once."""
    totals: Counter[str] = Counter()
    for _, tensor in state_tensors(model):
        totals[dtype_name(tensor.dtype)] += tensor.numel() * tensor.element_size()
    return dict(totals)


def layer_table(model: nn.Module) -> list[LayerRow]:
    """List each module with tensors of its own, in the model's order; a tied tensor belongs to its first owner."""
    rows: list[LayerRow] = []
    seen: set[tuple[object, ...]] = set()
    for name, module in model.named_modules():
        parameters = _unseen(module.parameters(recurse=False), seen)
        buffers = _unseen(module.buffers(recurse=False), seen)
        if not parameters and not buffers:
            continue
        rows.append(
            LayerRow(
                name=name,
                kind=type(module).__name__,
                params=sum(p.numel() for p in parameters),
                params_nonzero=sum(int(torch.count_nonzero(p.detach())) for p in parameters),
                bytes=sum(t.numel() * t.element_size() for t in parameters + buffers),
            )
        )
    return rows


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as users write it, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def model_dtype(model: nn.Module) -> str:
    """Name the dtype of most of the model's bytes, such as "float32"; "float32" for a model without tensors."""
    totals = bytes_by_dtype(model)
    return max(totals, key=lambda name: totals[name]) if totals else "float32"


def _unseen(tensors: Iterator[Tensor], seen: set[tuple[object, ...]]) -> list[Tensor]:
    fresh = []
    for tensor in tensors:
        identity = _identity(tensor)
        if identity not in seen:
            seen.add(identity)
            fresh.append(tensor)
    return fresh


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Tell whether two tensors are one: the same memory read in the same way."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
