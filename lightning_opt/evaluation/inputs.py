"""Bring a batch of inputs to another batch size or device."""

import torch
from torch import Tensor

from lightning_opt.forward import Inputs, batch_size_of, map_inputs


def at_batch(inputs: Inputs, batch: int) -> Inputs:
    """Repeat the samples of `inputs` along axis 0 and cut them to `batch` samples.

    Tensors without axes (a flag, a temperature) stay as they are.

    Raises:
        ValueError: `batch` is below 1 or `inputs` holds no sample.
    """
    have = batch_size_of(inputs)
    if batch < 1 or have < 1:
        raise ValueError(
            f"batch must be at least 1 and the inputs must hold a sample; got batch {batch}, {have} samples"
        )

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or have == batch:
            return tensor
        repeats = -(-batch // have)
        return tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:batch].contiguous()

    resized: Inputs = map_inputs(inputs, resize)
    return resized


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Move each tensor of `inputs` to `device`."""
    moved: Inputs = map_inputs(inputs, lambda tensor: tensor.to(device))
    return moved


def to_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Cast the floating-point tensors of `inputs` to `dtype`; token ids and masks stay."""
    cast: Inputs = map_inputs(inputs, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return cast
