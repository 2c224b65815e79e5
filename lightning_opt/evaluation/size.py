"""Bytes on disk: of a file, of a folder, and of a model's weights as one safetensors file."""

import json
from pathlib import Path

import torch
from torch import nn

from lightning_opt.errors import StorageError
from lightning_opt.evaluation.parameters import state_tensors

# The dtype names of the safetensors format, widest alignment first: the order in which the format lays tensors out.
_FORMAT_ORDER = (
    (torch.uint64, "U64"),
    (torch.int64, "I64"),
    (torch.float64, "F64"),
    (torch.complex64, "C64"),
    (torch.float32, "F32"),
    (torch.uint32, "U32"),
    (torch.int32, "I32"),
    (torch.bfloat16, "BF16"),
    (torch.float16, "F16"),
    (torch.uint16, "U16"),
    (torch.int16, "I16"),
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.float8_e5m2, "F8_E5M2"),
    (torch.int8, "I8"),
    (torch.uint8, "U8"),
    (torch.bool, "BOOL"),
)


def bytes_on_disk(path: str | Path) -> int:
    """Return the bytes of a file, or of all regular files below a folder; links are not followed.

    Raises:
        StorageError: There is nothing at `path`.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(item.lstat().st_size for item in path.rglob("*") if item.is_file() and not item.is_symlink())
    raise StorageError(f"{path} is neither a file nor a folder, so its size cannot be read; check the path")


def safetensors_bytes(model: nn.Module) -> int:
    """Return the size that `model`'s state dict has as a safetensors file, without writing it; tied tensors count once.

    Raises:
        ValueError: A tensor has a dtype that the format does not know.
    """
    rank = {dtype: place for place, (dtype, _) in enumerate(_FORMAT_ORDER)}
    code = dict(_FORMAT_ORDER)
    tensors = dict(state_tensors(model))
    unknown = {tensor.dtype for tensor in tensors.values()} - set(rank)
    if unknown:
        raise ValueError(f"safetensors has no dtype for {sorted(map(str, unknown))}")
    header, offset = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (rank[item[1].dtype], item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": code[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header_bytes = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    padded = -(-header_bytes // 8) * 8
    return 8 + padded + offset
