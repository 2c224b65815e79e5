"""Embedding tables: only the rows that are looked up are rounded, or turned from integers into numbers."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.quantization.functional import dequantize, fake_quantize, lsq, scale_and_zero_point
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers.base import LayerKind, QuantizedLayer, handler
from lightning_opt.quantization.layers.integer import IntegerLayer
from lightning_opt.quantization.observers import MinMax
from lightning_opt.quantization.packing import unpack
from lightning_opt.quantization.quantizer import FakeQuantizer


class QuantizedTable(QuantizedLayer):
    """The behaviour of a table whose rows are rounded, after they are looked up where that is the same."""

    def answer(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        quantizer, table = self.weight_quantizer, cast(Any, self)
        if quantizer is None or not quantizer.enabled or not _by_row(self, quantizer.grid):
            return super().answer(input, *args, **kwargs)
        if quantizer.learnable and quantizer.grid.axis is None:
            return super().answer(input, *args, **kwargs)
        ids = input.reshape(-1)
        rows = functional.embedding(
            ids, table.weight, table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq, sparse=table.sparse
        )
        return _of_rows(self, _rounded(quantizer, rows, table.weight, ids), input, *args, **kwargs)


class IntegerTable(IntegerLayer):
    """The behaviour of a table of integers."""

    def answer(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _by_row(self, self.weight_grid):
            return self.kind.compute(self, input, self.weight, None, *args, **kwargs)
        ids, grid, count = input.reshape(-1), self.weight_grid, self.weight_shape[0]
        q = _look_up(self.stored, ids)
        if self.is_packed:
            q = unpack(q, grid, self.weight_shape[1:])
        scale = _of_ids(self.weight_scale, ids, grid, count)
        zero_point = _of_ids(self.weight_zero_point, ids, grid, count)
        return _of_rows(self, dequantize(q, scale, zero_point, grid).to(self.dtype), input, *args, **kwargs)


def _by_row(table: Any, grid: Grid) -> bool:
    """Tell whether rows can be treated one by one."""
    if isinstance(table, nn.EmbeddingBag) and (table.padding_idx is not None or table.scale_grad_by_freq):
        return False
    return grid.axis in (0, None)


def _rounded(quantizer: FakeQuantizer, rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    grid = quantizer.grid
    if quantizer.observing and not quantizer.learnable:
        seen = weight if grid.axis is None else rows
        scale, zero_point = scale_and_zero_point(*MinMax().of(seen, grid), grid)
        return fake_quantize(rows, scale, zero_point, grid, is_covered=True)
    scale = _of_ids(quantizer.positive_scale(), ids, grid, len(weight))
    zero_point = _of_ids(quantizer.zero_point, ids, grid, len(weight))
    return (lsq if quantizer.learnable else fake_quantize)(rows, scale, zero_point, grid)


def _of_rows(table: Any, rows: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return what a table returns, given the row of each id in `input`."""
    if isinstance(table, nn.EmbeddingBag):
        places = torch.arange(len(rows), device=rows.device).reshape(input.shape)
        return _bag(table, places, rows, None, *args, **kwargs)
    return rows.reshape(*input.shape, rows.shape[-1])


def _of_ids(values: Tensor, ids: Tensor, grid: Grid, count: int) -> Tensor:
    """Return the scales (or zero points) of some rows of `count`."""
    return values if grid.axis is None else values.reshape(count, -1).index_select(0, ids).reshape(-1)


def _look_up(table: Tensor, ids: Tensor) -> Tensor:
    if table.dtype.is_floating_point and table.element_size() == 1:  # float8 has few operators
        return table.view(torch.uint8).index_select(0, ids).view(table.dtype)
    return table.index_select(0, ids)


def _table(module: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.embedding(input, weight, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)


def _bag(
    module: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    return functional.embedding_bag(
        input,
        weight,
        offsets,
        scale_grad_by_freq=module.scale_grad_by_freq,
        mode=module.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=module.include_last_offset,
        padding_idx=module.padding_idx,
    )


_EMBEDDING, _EMBEDDING_BAG = (
    LayerKind(name="embedding", layer=layer, compute=compute, behaviour=QuantizedTable, integer=IntegerTable)
    for layer, compute in ((nn.Embedding, _table), (nn.EmbeddingBag, _bag))
)


@handler.register
def _embedding(module: nn.Embedding) -> LayerKind:
    return _EMBEDDING


@handler.register
def _embedding_bag(module: nn.EmbeddingBag) -> LayerKind:
    return _EMBEDDING_BAG
