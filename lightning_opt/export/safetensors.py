"""Write and read a model's weights as one safetensors file; a tied tensor is written once."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.errors import StorageError
from lightning_opt.evaluation.parameters import state_tensors
from lightning_opt.export.files import write_durably


def write_safetensors(model: nn.Module, path: Path) -> Path:
    """Write the state dict of `model` to `path`, durably and byte for byte the same for the same weights.

    Raises:
        StorageError: The file could not be written.
        ValueError: The state dict holds something that is not a dense tensor.
    """
    from safetensors.torch import save_file

    strange = [name for name, value in model.state_dict().items() if not _is_dense(value)]
    if strange:
        raise ValueError(f"the state dict entry {strange[0]!r} is not a dense tensor and cannot be kept as safetensors")
    # A view of a larger tensor must be copied: the format writes whole tensors.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in state_tensors(model)}
    write_durably(path, lambda temporary: save_file(tensors, temporary))
    return path


def read_safetensors(model: nn.Module, path: Path) -> nn.Module:
    """Load the weights at `path` into `model`, in place, every name and shape agreeing; dtypes follow the file.

    Raises:
        StorageError: The file is damaged, or its names or shapes are not those of the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} is not a readable safetensors file: {error}") from error
    targets = dict(state_tensors(model))
    _check_names(tensors, targets, path)
    live = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in tensors.items():
            if live[name].dtype != value.dtype:
                live[name].data = live[name].data.to(value.dtype)
    try:
        model.load_state_dict(tensors, strict=False)  # names were compared above; only tied ones are absent
    except RuntimeError as error:
        raise StorageError(
            f"{path} does not fit {type(model).__name__}: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model


def _check_names(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [name for name in found if name in expected and found[name].shape != expected[name].shape]
    if missing or unknown:
        what = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is not part of the model"
        count = len(missing) + len(unknown)
        raise StorageError(
            f"{path} does not fit the model: {what} ({count} names differ); was it another model's file?"
        )
    if wrong:
        shapes = f"{tuple(found[wrong[0]].shape)} in the file, {tuple(expected[wrong[0]].shape)} in the model"
        raise StorageError(f"{path} does not fit the model: {wrong[0]!r} has shape {shapes}")


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
