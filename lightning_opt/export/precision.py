"""In words, what numbers a model computes with."""

from typing import Any

import torch
from torch import nn

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
FLOATS = frozenset(_NAMES.values())


def precision_of(model: nn.Module) -> str:
    """Return the precision of a model: "int8", "int8 dynamic", "int4 weights, int8 values", "int4 weights", "fp32".

    Embedding tables do not count where there are other layers of integers.

    Example:
        >>> precision_of(nn.Linear(2, 2))
        'fp32'
    """
    from lightning_opt.quantization.layers.embedding import IntegerTable  # that room stands on this one, elsewhere
    from lightning_opt.quantization.layers.integer import IntegerLayer
    from lightning_opt.quantization.quantizer import FakeQuantizer

    layers = [module for module in model.modules() if isinstance(module, IntegerLayer)]
    if not layers:
        return _NAMES.get(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32), "fp32")
    factors = [layer for layer in layers if not isinstance(layer, IntegerTable)]
    weights = _in_words([layer.weight_grid for layer in factors or layers])
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer) and module.enabled]
    if not quantizers:
        return f"{weights} weights"
    values = _in_words([quantizer.grid for quantizer in quantizers])
    dynamic = " dynamic" if all(quantizer.dynamic for quantizer in quantizers) else ""
    return f"{values}{dynamic}" if weights == values else f"{weights} weights, {values} values{dynamic}"


def _in_words(grids: list[Any]) -> str:
    found = sorted({"fp8" if grid.is_float else f"int{grid.bits}" for grid in grids})
    return " and ".join(found)
