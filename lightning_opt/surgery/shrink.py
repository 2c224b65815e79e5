"""Cut tensors along their axes: how a pruned model becomes a smaller one."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_opt.surgery.edits import Dims, Edit

_MAX_NESTING = 4


@dataclass(frozen=True)
class Shrink(Edit):
    """Keep some indices of some axes of parameters and buffers, and set the numbers in modules that say how many.

    Parameter objects stay the same objects, so that optimizers, tied weights and name tables go on knowing them; their
    gradients are dropped. A tensor that several names share is cut once. Everything is checked before anything changes.

    Attributes:
        kept: `{full tensor name: {dim: rising indices to keep}}`; JSON's string dims are read as numbers.
        attributes: `{full module name: {attribute: number or list of numbers}}`, "" being the model itself. Only a
            number, or a list or tuple of numbers, that the module already holds can be replaced.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> edit = Shrink(
        ...     kept={"0.weight": {0: [0, 2]}, "0.bias": {0: [0, 2]}, "2.weight": {1: [0, 2]}},
        ...     attributes={"0": {"out_features": 2}, "2": {"in_features": 2}},
        ... )
        >>> edit.apply(model)(torch.ones(1, 3)).shape
        torch.Size([1, 2])
    """

    op: ClassVar[str] = "shrink"

    kept: Mapping[str, Dims]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", {name: _dims(name, dims) for name, dims in _items("kept", self.kept)})
        values = {path: _values(path, named) for path, named in _items("attributes", self.attributes)}
        object.__setattr__(self, "attributes", values)

    def __hash__(self) -> int:
        return hash((self.op, tuple(sorted(self.kept)), tuple(sorted(self.attributes))))

    def apply(self, model: nn.Module) -> nn.Module:
        cuts = self.cuts(model)
        changes = list(self._changes(model))
        cut_data = {tensor: cut(tensor.detach(), dims) for tensor, dims in cuts.items()}
        for tensor, data in cut_data.items():
            _replace_data(tensor, data)
        for module, attribute, value in changes:
            setattr(module, attribute, value)
        return model

    def cuts(self, model: nn.Module) -> dict[Tensor, Dims]:
        """Return which dims of which parameters and buffers of `model` are cut, each tensor once; change nothing.

        Raises:
            ValueError: A tensor, dim or index is not in the model, or two names of one tensor disagree.
        """
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors.update(model.named_buffers(remove_duplicate=False))
        found: dict[Tensor, Dims] = {}
        first_name: dict[Tensor, str] = {}
        for name, dims in self.kept.items():
            tensor = tensors.get(name)
            if tensor is None:
                raise ValueError(f"kept: {name!r} names no parameter or buffer of {type(model).__name__}")
            _check_fits(name, tensor, dims)
            if found.setdefault(tensor, dims) != dims:
                raise ValueError(f"kept: {first_name[tensor]!r} and {name!r} are one tensor, and are cut differently")
            first_name.setdefault(tensor, name)
        return found

    def under(self, path: str) -> "Shrink":
        kept = {f"{path}.{name}": dims for name, dims in self.kept.items()}
        return Shrink(kept, {f"{path}.{name}".rstrip("."): values for name, values in self.attributes.items()})

    def _changes(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
        for path, values in self.attributes.items():
            try:
                module = model.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"attributes: {path!r} names no module of {type(model).__name__}") from error
            for attribute, value in values.items():
                where = f"attributes: {attribute!r} of {path!r} ({type(module).__name__})"
                if attribute not in vars(module):
                    raise ValueError(f"{where} is not there")
                yield module, attribute, _like(vars(module)[attribute], value, where)


def cut(tensor: Tensor, dims: Dims) -> Tensor:
    """Return a copy of `tensor` with only the indices `dims[dim]` along each dim, in the same memory format."""
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    channels_last = channels_last and tensor.is_contiguous(memory_format=torch.channels_last)
    smaller = tensor
    for dim, indices in dims.items():
        smaller = smaller.index_select(dim, torch.tensor(indices, device=tensor.device))
    smaller = smaller.clone() if smaller is tensor else smaller
    return smaller.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _replace_data(tensor: Tensor, data: Tensor) -> None:
    tensor.grad = None
    if tensor.requires_grad:
        # A graph that is still alive, such as that of the last loss, keeps the node that receives gradients of the old
        # shape; a change of dtype is what makes autograd forget it.
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def _check_fits(name: str, tensor: Tensor, dims: Dims) -> None:
    if hasattr(tensor, "device_mesh") or nn.parameter.is_lazy(tensor):
        raise ValueError(f"kept: {name!r} is sharded or not yet initialised; its axes cannot be cut")
    for dim, indices in dims.items():
        if dim >= tensor.dim():
            raise ValueError(f"kept: {name!r} has shape {tuple(tensor.shape)}, which has no dim {dim}")
        if indices[-1] >= tensor.shape[dim]:
            raise ValueError(
                f"kept: {name!r} keeps index {indices[-1]} of dim {dim}, which has {tensor.shape[dim]} entries"
            )


def _items(field_name: str, values: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{field_name} must be an object; got {str(values)[:80]!r}")
    for name, inside in values.items():
        if not isinstance(name, str) or not isinstance(inside, Mapping):
            raise ValueError(f"{field_name} must hold an object under each name; got {name!r}: {str(inside)[:80]!r}")
        yield name, inside


def _dims(name: str, dims: Mapping[Any, Any]) -> Dims:
    found: dict[int, tuple[int, ...]] = {}
    for key, indices in dims.items():
        dim = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if type(dim) is not int or dim < 0 or dim in found:
            raise ValueError(f"kept: {name!r} must name each dim once, from 0; got {key!r}")
        found[dim] = _indices(f"kept: dim {dim} of {name!r}", indices)
    return dict(sorted(found.items()))


def _indices(where: str, indices: Any) -> tuple[int, ...]:
    if not isinstance(indices, list | tuple) or any(type(item) is not int for item in indices):
        raise ValueError(f"{where} must be a list of whole numbers; got {str(indices)[:80]}")
    if not indices:
        raise ValueError(f"{where} would keep nothing")
    if indices[0] < 0 or any(b <= a for a, b in itertools.pairwise(indices)):
        raise ValueError(f"{where} must rise from 0 or more without repeats; got {str(indices)[:80]}")
    return tuple(indices)


def _values(path: str, values: Mapping[Any, Any]) -> dict[str, Any]:
    for attribute, value in values.items():
        where = f"attributes: {attribute!r} of {path!r}"
        if not isinstance(attribute, str) or not attribute.isidentifier() or attribute.startswith("__"):
            raise ValueError(f"{where} is not an attribute that can be set")
        if not _is_plain(value):
            raise ValueError(f"{where} must be a finite number or a list of them; got {str(value)[:80]!r}")
    return {attribute: _tuples(value) for attribute, value in values.items()}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < _MAX_NESTING and all(_is_plain(item, depth + 1) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _like(present: Any, value: Any, where: str) -> Any:
    """Return `value` in the form of what it replaces: a number for a number, a tuple for a tuple."""
    if not _is_plain(present):
        raise ValueError(f"{where} is {type(present).__name__}; only numbers and lists of numbers can be replaced")
    if isinstance(present, list | tuple) != isinstance(value, list | tuple):
        raise ValueError(f"{where} is {present!r}, which {value!r} cannot replace")
    if isinstance(value, list | tuple):
        return value if isinstance(present, tuple) else list(value)
    return value
