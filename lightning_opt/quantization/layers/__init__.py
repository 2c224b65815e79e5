"""Layers whose weights and values are rounded to grids, and layers whose weights are integers."""

from lightning_opt.quantization.layers import convolution, embedding, linear  # each adds its handlers
from lightning_opt.quantization.layers.base import LayerKind, QuantizedLayer, handler, refusal
from lightning_opt.quantization.layers.batch_norm import FoldableBatchNorm, FoldedBatchNorm
from lightning_opt.quantization.layers.integer import IntegerLayer, unpack_weights
from lightning_opt.quantization.layers.plan import LayerPlan

__all__ = [
    "FoldableBatchNorm",
    "FoldedBatchNorm",
    "IntegerLayer",
    "LayerKind",
    "LayerPlan",
    "QuantizedLayer",
    "convolution",
    "embedding",
    "handler",
    "linear",
    "refusal",
    "unpack_weights",
]
