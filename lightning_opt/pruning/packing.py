"""Sparse weights as files: one bit says which weights are there, and only those are stored.

The file is a safetensors container. A tensor with enough zeros becomes `NAME::bits`, one bit an element, and
`NAME::values`, the elements that are not zero in their order; other tensors are stored as they are. What each entry
means is JSON in the header's metadata. Reading runs no code, and every size is compared before memory is taken.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_opt.errors import StorageError, UntrustedInputError

FORMAT = "lightning_opt.bitmask"
VERSION = 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_PLACES = (128, 64, 32, 16, 8, 4, 2, 1)
_MAX_METADATA = 64 * 1024 * 1024


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bools into uint8, eight a byte, the first in the highest bit (as `numpy.packbits`); row-major order.

    >>> pack_bits(torch.tensor([True, False, False, False, False, False, False, True, True]))
    tensor([129, 128], dtype=torch.uint8)
    """
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.view(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    packed = torch.zeros(len(padded), dtype=torch.uint8, device=mask.device)
    for column, place in enumerate(_PLACES):
        packed.add_(padded[:, column], alpha=place)
    return packed


def unpack_bits(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo `pack_bits`: bools of `shape`.

    Raises:
        ValueError: `packed` is not uint8 of the length that `shape` needs, or has bits behind its end.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != (count + 7) // 8:
        raise ValueError(f"{count} bits need {(count + 7) // 8} bytes, not {tuple(packed.shape)} of {packed.dtype}")
    places = torch.tensor(_PLACES, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1) & places).reshape(-1) != 0
    if bool(bits[count:].any()):
        raise ValueError("there are bits behind the end of the mask")
    return bits[:count].reshape(shape)


def write_sparse(
    model: nn.Module | Mapping[str, Tensor], path: Path, *, dtype: Literal["fp32", "fp16"] = "fp32"
) -> Path:
    """Write a model or state dict to a bit-mask file, durably.

    Args:
        model: Its state dict is taken. Names that share one tensor are stored once.
        path: The file, usually with the ending `.safetensors`.
        dtype: "fp32" stores all values as they are: equal again when read (a negative zero comes back as zero). "fp16"
            rounds float32 and float64 values of tensors with two or more dimensions to float16, which loses digits; a
            tensor with values beyond float16 stays as it is. The rounded values are read back exactly.

    Raises:
        StorageError: The file could not be written.
        ValueError: An entry is not a dense tensor of a plain type, or `dtype` is neither.
    """
    from safetensors.torch import save_file

    from lightning_opt.export.files import write_durably

    tensors, metadata = encode(model, dtype=dtype)
    write_durably(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return path


def encode(
    model: nn.Module | Mapping[str, Tensor], *, dtype: Literal["fp32", "fp16"] = "fp32"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the stored tensors and the metadata of a bit-mask file (see `write_sparse`)."""
    if dtype not in ("fp32", "fp16"):
        raise ValueError(f"dtype must be 'fp32' or 'fp16', not {dtype!r}")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        _check_storable(name, tensor)
        owner = owners.setdefault(_identity(tensor, name), name)
        if owner != name:
            entries[name] = {"same_as": owner}
            continue
        values = tensor.detach().cpu()
        small = _to_half(values) if dtype == "fp16" else values
        entries[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        entries[name]["sparse"] = _store(stored, name, values, small)
    # One key of metadata: the container writes several in no fixed order, and equal weights shall give equal files.
    return stored, {FORMAT: json.dumps({"version": VERSION, "entries": entries}, separators=(",", ":"))}


def read_sparse(path: Path) -> dict[str, Tensor]:
    """Read a bit-mask file to a dense state dict, in the types that the weights had.

    Raises:
        StorageError: The file is missing, cut short or no safetensors file.
        UntrustedInputError: Its entries contradict each other, or it was made to be large.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            entries = _entries(path, file.metadata() or {})
            names = set(file.keys())
            state = {name: _decode(path, file, name, e) for name, e in entries.items() if "same_as" not in e}
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} is not a readable bit-mask file: {error}; write it again") from error
    used = {key for name, e in entries.items() if "same_as" not in e for key in _keys(name, sparse=e["sparse"])}
    if names != used:
        raise _untrusted(path, f"tensor {sorted(names ^ used)[0]!r} belongs to no entry")
    for name, entry in entries.items():
        if "same_as" in entry and entry["same_as"] not in state:
            raise _untrusted(path, f"entry {name!r} refers to {str(entry['same_as'])[:80]!r}, which is not there")
    return {name: state[entry.get("same_as", name)] for name, entry in entries.items()}


def _store(stored: dict[str, Tensor], name: str, values: Tensor, small: Tensor) -> bool:
    """Put a tensor among the stored ones in its smaller form; return whether that is the sparse one."""
    kept = values != 0
    count = int(kept.count_nonzero())
    sparse = values.numel() / 8 + count * small.element_size() < small.numel() * small.element_size()
    if sparse:
        stored[f"{name}::bits"] = pack_bits(kept)
        stored[f"{name}::values"] = small[kept]
    else:
        stored[f"{name}::dense"] = small.contiguous().clone()
    return sparse


def _to_half(values: Tensor) -> Tensor:
    if values.dim() < 2 or values.dtype not in (torch.float32, torch.float64):
        return values
    half = values.half()
    return half if bool(half.isfinite().all()) else values


def _decode(path: Path, file: Any, name: str, entry: dict[str, Any]) -> Tensor:
    shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
    keys = _keys(name, sparse=entry["sparse"])
    missing = [key for key in keys if key not in file.keys()]  # noqa: SIM118 - a safetensors file, not a mapping
    if missing:
        raise _untrusted(path, f"tensor {missing[0]!r} is missing")
    sizes = [list(file.get_slice(key).get_shape()) for key in keys]
    if not entry["sparse"]:
        if sizes != [shape]:
            raise _untrusted(path, f"{name!r} has shape {sizes[0]}, its entry says {shape}")
        return _checked(path, name, file.get_tensor(keys[0]), dtype).to(dtype)
    if len(sizes[1]) != 1:
        raise _untrusted(path, f"the values of {name!r} have shape {sizes[1]}, and are to be a list")
    try:  # one byte of bits stands for eight elements, so the file's own size bounds what is taken
        kept = unpack_bits(file.get_tensor(keys[0]), tuple(shape))
    except ValueError as error:
        raise _untrusted(path, f"the bits of {name!r}: {error}") from error
    if int(kept.count_nonzero()) != sizes[1][0]:
        raise _untrusted(path, f"{name!r} has {sizes[1][0]} values for {int(kept.count_nonzero())} set bits")
    values = _checked(path, name, file.get_tensor(keys[1]), dtype)
    dense = torch.zeros(shape, dtype=dtype)
    dense[kept] = values.to(dtype)
    return dense


def _entries(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if FORMAT not in metadata:
        raise StorageError(f"{path} is not a bit-mask file; write it with write_sparse")
    text = metadata[FORMAT]
    try:
        said = json.loads(text) if len(text) <= _MAX_METADATA else None
    except (ValueError, RecursionError) as error:
        raise _untrusted(path, "its metadata is not JSON") from error
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise _untrusted(path, f"its metadata is not that of version {VERSION}")
    entries = said.get("entries")
    if not isinstance(entries, dict):
        raise _untrusted(path, "its entries are not an object")
    for name, entry in entries.items():
        if not _is_sound(entry):
            raise _untrusted(path, f"entry {name[:80]!r} is not a shape, a type and a kind")
    return entries


def _is_sound(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    if entry.keys() == {"same_as"}:
        return isinstance(entry["same_as"], str)
    if entry.keys() != {"shape", "dtype", "sparse"} or type(entry["sparse"]) is not bool:
        return False
    shape = entry["shape"]
    sizes = isinstance(shape, list) and len(shape) <= 16 and all(type(s) is int and 0 <= s < 1 << 48 for s in shape)
    return sizes and isinstance(entry["dtype"], str) and entry["dtype"] in _DTYPES


def _checked(path: Path, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Refuse values of another type than the entry's; only a float may be stored as float16."""
    rounded = values.dtype == torch.float16 and dtype in (torch.float32, torch.float64)
    if values.dtype != dtype and not rounded:
        raise _untrusted(path, f"the values of {name!r} are {values.dtype}, its entry says {dtype}")
    return values


def _keys(name: str, *, sparse: bool) -> list[str]:
    return [f"{name}::bits", f"{name}::values"] if sparse else [f"{name}::dense"]


def _check_storable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in _DTYPES.values():
        raise ValueError(f"the state dict entry {name!r} is not a dense tensor of a plain type and can't be stored")


def _identity(tensor: Tensor, name: str) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (name,)
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def _untrusted(path: Path, what: str) -> UntrustedInputError:
    return UntrustedInputError(f"{path} can't be trusted: {what}; get the file again from where it was made")
