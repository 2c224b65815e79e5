"""Bring the integer weights of an ONNX graph to the layouts and types that engines compute with."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_opt.export.quantized_graph import (
    array_of,
    constant,
    insert,
    is_activation_of,
    is_constant,
    is_weight,
    take_place,
)

_INT4 = {"int8": ("int4", -8, 7), "uint8": ("uint4", 0, 15)}
_MIN_INT4_VALUES = 64
"""Fewer values are not worth a node that widens them."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Integers with their scales.

    Attributes:
        name: For the constants that are made of it.
        q: The integers.
        scale: `(n,)`, scalar, or with one axis cut into blocks.
        zero_point: Shaped like `scale`; None for 8-bit floats.
        axis: Of the scales; with blocks: the axis that is cut.
        block: Values in a block, or 0.
        source: The value of the graph that holds the integers as they are here, where a table reads it too.
    """

    name: str
    q: Any
    scale: Any
    zero_point: Any
    axis: int
    block: int
    source: Any = None

    def transposed(self) -> "Weight":
        """Return the same matrix the other way round."""
        turn = (lambda x: x.T) if self.block else (lambda x: x)
        zero_point = None if self.zero_point is None else turn(self.zero_point)
        values = {"q": self.q.T, "scale": turn(self.scale), "zero_point": zero_point}
        return replace(self, name=f"{self.name}_t", axis=1 - self.axis, source=None, **values)

    def in_blocks(self) -> "Weight":
        """Return the blocks of the columns of a matrix as a stack.

        ONNX Runtime would join a matrix to an integer product that knows one scale a column, and fail when it runs.
        """
        if self.axis != 0 or self.q.shape[0] % self.block:
            return self
        q = self.q.reshape(-1, self.block, self.q.shape[1])
        zero_point = None if self.zero_point is None else self.zero_point[:, None]
        return replace(self, q=q, scale=self.scale[:, None], zero_point=zero_point, axis=1, source=None)

    def narrow_type(self) -> str:
        """Return the 4-bit type that holds all integers, if it is worth it, or nothing."""
        kind, low, high = _INT4.get(str(self.q.dtype), ("", 0, -1))
        if not kind or self.q.size < _MIN_INT4_VALUES:
            return ""
        fits = all(each.min() >= low and each.max() <= high for each in (self.q, self.zero_point))
        return kind if fits else ""


def place_weights(graph: Any) -> None:
    """Rewrite how each weight is read, by the kind of layer that reads it."""
    for node in list(graph):
        if not is_weight(node):
            continue
        weight = _weight_of(node)
        if any(use.node.op_type == "Gather" for use in node.inputs[0].uses()):
            weight = replace(weight, source=node.inputs[0])
        for use in list(node.outputs[0].uses()):
            _place(graph, weight, use.node, use.idx)
    narrow_tables(graph)


def _place(graph: Any, weight: Weight, reader: Any, index: int) -> None:
    if reader.op_type == "Transpose" and weight.q.ndim == 2:
        for use in list(reader.outputs[0].uses()):
            kind, is_factor = use.node.op_type, use.idx == 1
            if kind == "MatMul" and is_factor and weight.source is None:
                _read(graph, weight.transposed(), use.node, 1)
            elif kind == "Gemm" and is_factor:
                _place_gemm(graph, weight.transposed(), use.node)
    elif reader.op_type == "Gemm" and index == 1:
        _place_gemm(graph, weight, reader)
    else:
        _read(graph, weight, reader, index)


def _place_gemm(graph: Any, weight: Weight, gemm: Any) -> None:
    """Keep a matrix product with a bias where it will be of integers; else write it as product and sum."""
    is_turned = gemm.attributes.get_int("transB", 0)
    if is_activation_of(gemm):
        rows = weight if is_turned else weight.transposed()
        import onnx_ir as ir

        gemm.attributes["transB"] = ir.AttrInt64("transB", 1)
        _read(graph, rows, gemm, 1)
        return
    plain = all(gemm.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if not plain or gemm.attributes.get_int("transA", 0) or weight.source is not None:
        _read(graph, weight, gemm, 1)
        return
    columns = weight.transposed() if is_turned else weight
    product = insert(graph, gemm, "MatMul", [gemm.inputs[0], gemm.inputs[1]])
    node = product.producer()
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        product = insert(graph, gemm, "Add", [product, gemm.inputs[2]])
    take_place(graph, product, gemm.outputs[0])
    _read(graph, columns, node, 1)


def _read(graph: Any, weight: Weight, reader: Any, index: int) -> None:
    """Let `reader` read `weight`."""
    is_product = reader.op_type == "MatMul" and index == 1
    is_dynamic = is_product and ranged_as_they_come(reader) is not None and weight.zero_point is not None
    if is_product and weight.block and weight.q.ndim == 2 and (is_dynamic or is_activation_of(reader)):
        weight, is_dynamic = weight.in_blocks(), False
    if is_dynamic and weight.block == 0:
        _product_of_integers(graph, weight, reader)
        return
    q, zero_point = weight.q, weight.zero_point
    kind = weight.narrow_type()
    integers = not kind or not is_product or is_activation_of(reader)
    held = _held(graph, weight, reader) if integers else constant(graph, _as(q, kind), weight.name)
    inputs = [held, constant(graph, weight.scale, f"{weight.name}_scale")]
    if zero_point is not None:
        shaped = zero_point if integers else _as(zero_point, kind)
        inputs.append(constant(graph, shaped, f"{weight.name}_zero_point"))
    along = {"axis": weight.axis} | ({"block_size": weight.block} if weight.block else {})
    values = insert(graph, reader, "DequantizeLinear", inputs, **(along if weight.scale.ndim else {}))
    if weight.block and weight.q.ndim == 3:  # see `in_blocks`
        flat = constant(graph, np.array([-1, weight.q.shape[2]]), f"{weight.name}_shape")
        values = insert(graph, reader, "Reshape", [values, flat])
    reader.replace_input_with(index, values)


def _held(graph: Any, weight: Weight, reader: Any) -> Any:
    """Keep integers that fit in 4 bits that way; they are widened once, when the file is read.

    No engine multiplies integers of 4 by integers of 8 bits.
    """
    import onnx_ir as ir

    kind = weight.narrow_type()
    if weight.source is not None:
        return weight.source  # see `narrow_tables`
    if not kind:
        return constant(graph, weight.q, weight.name)
    held = constant(graph, _as(weight.q, kind), weight.name)
    return insert(graph, reader, "Cast", [held], to=ir.DataType.INT8 if kind == "int4" else ir.DataType.UINT8)


def ranged_as_they_come(layer: Any) -> Any:
    """Return the node that finds the range of what a layer reads and quantizes it, if there is one."""
    before = layer.inputs[0].producer()
    before = before.inputs[0].producer() if before is not None and before.op_type == "DequantizeLinear" else None
    return before if before is not None and before.op_type == "DynamicQuantizeLinear" else None


def _product_of_integers(graph: Any, weight: Weight, product: Any) -> None:
    """Spell the product out in integers, which ONNX Runtime joins with its bias and with what quantizes its input."""
    import onnx_ir as ir

    q, scale, zero_point = ranged_as_they_come(product).outputs
    factors = [q, _held(graph, weight, product), zero_point]
    factors.append(constant(graph, weight.zero_point, f"{weight.name}_zero_point"))
    sums = insert(graph, product, "Cast", [insert(graph, product, "MatMulInteger", factors)], to=ir.DataType.FLOAT)
    scales = insert(graph, product, "Mul", [scale, constant(graph, weight.scale, f"{weight.name}_scale")])
    values = insert(graph, product, "Mul", [sums, scales])
    take_place(graph, values, product.outputs[0])


def narrow_tables(graph: Any) -> None:
    """Keep tables whose integers fit in 4 bits that way; they are widened once, when the file is read."""
    import onnx_ir as ir

    for value in list(graph.initializers.values()):
        kind, low, high = _INT4.get(str(array_of(value).dtype), ("", 0, -1)) if is_constant(value) else ("", 0, -1)
        readers = [use for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
        if not kind or not readers or value.const_value.size < _MIN_INT4_VALUES:
            continue
        q = array_of(value)
        if q.min() < low or q.max() > high:
            continue
        held = constant(graph, _as(q, kind), f"{value.name}_int4")
        first = min((use.node for use in readers), key=list(graph).index)
        wide = insert(graph, first, "Cast", [held], to=ir.DataType.INT8 if kind == "int4" else ir.DataType.UINT8)
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, wide)


def _weight_of(node: Any) -> Weight:
    q, scale = array_of(node.inputs[0]), array_of(node.inputs[1])
    zero_point = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    block = node.attributes.get_int("block_size", 0)
    axis = node.attributes.get_int("axis", 1) % max(q.ndim, 1)
    return Weight(name=node.inputs[0].name, q=q, scale=scale, zero_point=zero_point, axis=axis, block=block)


def _as(array: Any, kind: str) -> Any:
    import ml_dtypes

    return array.astype(getattr(ml_dtypes, kind))
