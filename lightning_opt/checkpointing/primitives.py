"""What may be in a checkpoint: values that `torch.load(weights_only=True)` gives back without running any code."""

import copy
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

from lightning_opt.errors import ConfigError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray)
_TORCH = (torch.Size, torch.device, torch.dtype, torch.layout)
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def to_primitives(value: Any, *, path: str = "") -> Any:
    """Return `value` with numpy scalars made Python numbers, or refuse what could not be loaded safely.

    Nothing is copied but the containers that held a numpy scalar.

    Args:
        value: A checkpoint, or a part of one.
        path: Where in the checkpoint it is; for the message.

    Raises:
        ConfigError: Naming the path of the first value of another kind (a `Path`, a module, a `DictConfig`, ...).
    """
    kind = type(value)
    if kind in _PLAIN or kind in _TORCH or _is_tensor(value):
        return value
    if isinstance(value, np.generic):
        return to_primitives(value.item(), path=path)
    if kind in (dict, OrderedDict, Counter):
        return _convert_dict(value, path=path)
    if kind in (list, tuple):
        return _convert_sequence(value, path=path)
    if kind is set:
        return {to_primitives(one, path=f"{path}{{}}") for one in value}
    raise ConfigError(
        f"checkpoint[{path or 'root'}] is a {kind.__module__}.{kind.__qualname__}, which cannot be loaded without "
        "running code: store plain numbers, strings, lists, dicts or tensors there (str(path), dict(config), ...)"
    )


def tensor_bytes(value: Any) -> int:
    """Return the bytes that the tensors in a checkpoint take on this process, shared ones counted once."""
    seen: dict[int, int] = {}
    _collect_storages(value, seen)
    return sum(seen.values())


def _is_tensor(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    allowed = torch.serialization.get_safe_globals()
    return type(value) in _TENSORS or type(value) in allowed or type(value).__name__ == "DTensor"


def _convert_dict(value: Any, *, path: str) -> Any:
    changed = {}
    for key, one in value.items():
        where = f"{path}.{key}" if path else str(key)
        if (new_key := to_primitives(key, path=f"{where} (the key)")) is not key:
            return _rebuilt(value, path=path)
        if (new := to_primitives(one, path=where)) is not one:
            changed[new_key] = new
    if not changed:
        return value
    result = copy.copy(value)  # keeps an OrderedDict's _metadata
    result.update(changed)
    return result


def _rebuilt(value: Any, *, path: str) -> Any:
    return type(value)((to_primitives(k, path=path), to_primitives(v, path=f"{path}.{k}")) for k, v in value.items())


def _convert_sequence(value: Any, *, path: str) -> Any:
    converted = [to_primitives(one, path=f"{path}[{number}]") for number, one in enumerate(value)]
    if all(new is old for new, old in zip(converted, value, strict=True)):
        return value
    return type(value)(converted)


def _collect_storages(value: Any, seen: dict[int, int]) -> None:
    if isinstance(value, torch.Tensor):
        storage = getattr(value, "_local_tensor", value).untyped_storage()  # of a DTensor, what this process holds
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for one in value.values():
            _collect_storages(one, seen)
    elif isinstance(value, list | tuple):
        for one in value:
            _collect_storages(one, seen)
