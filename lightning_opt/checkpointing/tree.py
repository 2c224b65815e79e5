"""Any tree of plain values and tensors as JSON that nothing but data can come out of, and back, exactly.

What JSON has no word for is an object with the key `"$"`: `{"$": "tuple", "v": [...]}`. Tensors are named and kept
apart. Floats come back bit for bit, also those that are not finite.
"""

import base64
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_opt.errors import ConfigError, UntrustedInputError

_TAG, _VALUE = "$", "v"
_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, DTensor)
_DICTS: dict[str, type] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
_NAMED: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout}


def encode(value: Any, *, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return a tree as plain JSON values, and the tensors that it refers to by name.

    Args:
        value: A checkpoint, or a part of one.
        prefix: With what the tensors' names begin; the rest is where in the tree they are.

    Raises:
        ConfigError: Naming the place of the first value that is neither plain nor a tensor.

    Example:
        >>> encode({"a": (1, float("inf"))})[0]
        {'a': {'$': 'tuple', 'v': [1, {'$': 'float', 'v': '7ff0000000000000'}]}}
    """
    encoder = _Encoder()
    return encoder.encode(value, prefix), encoder.tensors


def decode(value: Any, read: Callable[[str], Tensor]) -> Any:
    """Return the tree that `encode` was given.

    Args:
        value: What `encode` returned, from a file that is not trusted.
        read: Returns a tensor by its name.

    Raises:
        UntrustedInputError: It holds a kind of value that `encode` does not write.
    """
    try:
        return _decode(value, read)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, struct.error, RecursionError) as error:
        raise UntrustedInputError(f"a tree of values holds something that is no value: {_shortly(error)}") from error


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # a tensor that occurs twice is kept once

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else _tagged("float", struct.pack(">d", value).hex())
        if isinstance(value, np.generic):
            return self.encode(value.item(), path)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind is list:
            return self._items(value, path)
        if kind in _DICTS.values():
            return self._dict(value, path)
        return self._rare(value, path)

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.encode(one, f"{path}.{number}") for number, one in enumerate(values)]

    def _dict(self, value: Any, path: str) -> Any:
        if type(value) is dict and all(type(key) is str for key in value) and _TAG not in value:
            return {key: self.encode(one, f"{path}.{key}") for key, one in value.items()}
        kind = next(name for name, one in _DICTS.items() if one is type(value))
        pairs = [[self.encode(k, f"{path}.key"), self.encode(one, f"{path}.{k}")] for k, one in value.items()]
        said = _tagged(kind, pairs)
        if (metadata := getattr(value, "_metadata", None)) is not None:  # a state dict's versions
            said["metadata"] = self.encode(metadata, f"{path}._metadata")
        return said

    def _tensor(self, value: Tensor, path: str) -> Any:
        usable = type(value) in _TENSORS and value.layout is torch.strided and not value.is_quantized
        if not usable or value.is_meta:
            raise ConfigError(
                f"checkpoint[{path}] is a {type(value).__name__} of layout {value.layout} on {value.device}: a sharded "
                "checkpoint holds ordinary tensors; store its parts"
            )
        if id(value) not in self._names:
            self._names[id(value)] = self._new_name(path)
            self.tensors[self._names[id(value)]] = value.detach()
        said = _tagged("tensor", self._names[id(value)])
        if isinstance(value, torch.nn.Parameter):
            said["trained"] = value.requires_grad
        return said

    def _new_name(self, path: str) -> str:
        name, number = path, 1
        while name in self.tensors:
            number += 1
            name = f"{path}#{number}"
        return name

    def _rare(self, value: Any, path: str) -> Any:
        if type(value) in (tuple, set):
            return _tagged(type(value).__name__, self._items(value, path))
        if isinstance(value, bytes | bytearray):
            return _tagged(type(value).__name__, base64.b64encode(value).decode())
        if type(value) is complex:
            return _tagged("complex", [self.encode(value.real, path), self.encode(value.imag, path)])
        if type(value) is torch.Size:
            return _tagged("size", list(value))
        if isinstance(value, torch.device):
            return _tagged("device", str(value))
        for kind, one in _NAMED.items():
            if isinstance(value, one):
                return _tagged(kind, str(value).removeprefix("torch."))
        raise ConfigError(
            f"checkpoint[{path or 'root'}] is a {type(value).__module__}.{type(value).__qualname__}, which cannot be "
            "loaded without running code: store plain numbers, strings, lists, dicts or tensors there"
        )


def _decode(value: Any, read: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(one, read) for one in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(one, read) for key, one in value.items()}
    kind, content = value[_TAG], value[_VALUE]
    if kind in _DICTS:
        return _decode_dict(value, read)
    if kind == "tensor":
        tensor = read(content)
        return tensor if "trained" not in value else torch.nn.Parameter(tensor, requires_grad=bool(value["trained"]))
    if kind in _NAMED:
        return _named(kind, content)
    return _PLAIN[kind](_decode(content, read))


def _decode_dict(value: Mapping[str, Any], read: Callable[[str], Tensor]) -> Any:
    pairs = [(_decode(key, read), _decode(one, read)) for key, one in value[_VALUE]]
    result = _DICTS[value[_TAG]](pairs) if value[_TAG] != "counter" else Counter(dict(pairs))
    if "metadata" in value and isinstance(result, OrderedDict):
        result._metadata = _decode(value["metadata"], read)  # type: ignore[attr-defined]
    return result


def _named(kind: str, name: str) -> Any:
    found = getattr(torch, name) if name.isidentifier() else None
    if not isinstance(found, _NAMED[kind]):
        raise ValueError(f"{name!r} is no {kind}")
    return found


def _float(digits: str) -> float:
    return float(struct.unpack(">d", bytes.fromhex(digits))[0])


def _device(name: str) -> torch.device:
    return torch.device(name)


_PLAIN: dict[str, Callable[[Any], Any]] = {
    "float": _float,
    "tuple": tuple,
    "set": set,
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "bytearray": lambda text: bytearray(base64.b64decode(text, validate=True)),
    "complex": lambda pair: complex(*pair),
    "size": torch.Size,
    "device": _device,
}


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {_TAG: kind, _VALUE: value}


def _shortly(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:160]
