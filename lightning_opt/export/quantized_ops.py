"""What stands for each quantization operator in an ONNX graph: standard operators of opset 21 and nothing else."""

from typing import Any

import torch

OPSET = 21
"""The first with integers of 4 bits and with scales for groups of values."""
_DOMAIN = "lightning_opt::"
_WHOLE_RANGES = ((0, 255), (-128, 127), (-127, 127))


def holds_quantization(program: torch.export.ExportedProgram) -> bool:
    """Tell whether a program was traced with its quantization as single operators."""
    return any(_name(node.target).startswith(_DOMAIN) for node in program.graph.nodes if node.op == "call_function")


def holds_dynamic(program: torch.export.ExportedProgram) -> bool:
    """Tell whether such a program quantizes values whose range it finds as they come."""
    return any(_name(node.target).startswith(f"{_DOMAIN}dynamic") for node in program.graph.nodes)


def translation_table() -> dict[Any, Any]:
    """Return what `torch.onnx.export` needs to know, as its `custom_translation_table`."""
    import lightning_opt.quantization.ops  # noqa: F401 - registers the operators

    known = torch.ops.lightning_opt
    return {
        known.quantize_dequantize.default: _quantize_dequantize,
        known.dequantize.default: _dequantize,
        known.dynamic_quantize_dequantize.default: _dynamic_quantize_dequantize,
    }


def _name(target: Any) -> str:
    return str(getattr(target, "name", lambda: "")()) if isinstance(target, torch._ops.OpOverload) else ""


def _quantize_dequantize(x: Any, scale: Any, zero_point: Any, axis: int | None, qmin: int, qmax: int) -> Any:
    import onnx_ir as ir

    op = _operators()

    kind = ir.DataType.INT8 if qmin < 0 else ir.DataType.UINT8
    scale, zero_point = _one_or_many(scale, axis), op.Cast(_one_or_many(zero_point, axis), to=kind)
    along = {} if axis is None else {"axis": axis}
    q = op.QuantizeLinear(x, scale, zero_point, **along)
    if (qmin, qmax) not in _WHOLE_RANGES:  # engines have no such integers: those of 8 bits, cut off
        q = op.Clip(q, _constant(qmin, kind), _constant(qmax, kind))
    return op.DequantizeLinear(q, scale, zero_point, **along)


def _dequantize(q: Any, scale: Any, zero_point: Any, axis: int | None, group_size: int | None) -> Any:
    op = _operators()

    if q.producer() is not None:  # rows of a table: their scales are looked up too
        return _arithmetic(q, scale, zero_point, axis, group_size)
    given = [] if q.dtype.is_floating_point() else [op.Cast(_one_or_many(zero_point, axis), to=q.dtype)]
    if axis is None or group_size is None:
        along = {} if axis is None else {"axis": axis}
        return op.DequantizeLinear(q, _one_or_many(scale, axis), *given, **along)
    shape = [int(size) for size in q.shape]
    if axis == 1 and len(shape) == 2:  # groups run down the columns
        laid = [_transposed_rows(each, shape[1]) for each in (scale, *given)]
        return op.DequantizeLinear(q, *laid, axis=0, block_size=group_size)
    if axis != 0:
        raise NotImplementedError(f"groups along all axes but number {axis} of {len(shape)}")
    rows = q if len(shape) == 2 else op.Reshape(q, _ints([shape[0], -1]))
    laid = [op.Reshape(each, _ints([shape[0], -1])) for each in (scale, *given)]
    values = op.DequantizeLinear(rows, *laid, axis=1, block_size=group_size)
    return values if len(shape) == 2 else op.Reshape(values, _ints(shape))


def _arithmetic(q: Any, scale: Any, zero_point: Any, axis: int | None, group_size: int | None) -> Any:
    """Spell `(q - zero_point) * scale` out for integers `(n, ...)` that the graph computes."""
    import onnx_ir as ir

    op = _operators()

    values, moved = op.Cast(q, to=ir.DataType.FLOAT), op.Cast(zero_point, to=ir.DataType.FLOAT)
    if axis is None:
        return op.Mul(op.Sub(values, moved), scale)
    if axis != 0:
        raise NotImplementedError(f"scales along axis {axis} of integers that the graph computes")
    if group_size is None:
        many = _ints([-1] + [1] * (len(q.shape) - 1))
        return op.Mul(op.Sub(values, op.Reshape(moved, many)), op.Reshape(scale, many))
    width = int(q.shape[1])
    if width % group_size:
        raise NotImplementedError(f"groups of {group_size} in rows of {width}")
    grouped, many = (
        op.Reshape(values, _ints([-1, width // group_size, group_size])),
        _ints([-1, width // group_size, 1]),
    )
    return op.Reshape(op.Mul(op.Sub(grouped, op.Reshape(moved, many)), op.Reshape(scale, many)), _ints([-1, width]))


def _dynamic_quantize_dequantize(x: Any, symmetric: bool, qmin: int, qmax: int) -> Any:
    import onnx_ir as ir

    op = _operators()

    if not symmetric and (qmin, qmax) == (0, 255):
        q, scale, zero_point = op.DynamicQuantizeLinear(x)
        return op.DequantizeLinear(q, scale, zero_point)
    zero, one = _constant(0, ir.DataType.FLOAT), _constant(1, ir.DataType.FLOAT)
    low, high = op.Min(op.ReduceMin(x, keepdims=0), zero), op.Max(op.ReduceMax(x, keepdims=0), zero)
    if symmetric:
        reach, steps, middle = op.Max(op.Neg(low), high), (qmax - qmin) / 2, 0 if qmin < 0 else (qmax + 1) // 2
        zero_point = _constant(middle, ir.DataType.FLOAT)
    else:
        reach, steps = op.Sub(high, low), float(qmax - qmin)
    some = op.Greater(reach, _constant(2.0**-30, ir.DataType.FLOAT))
    scale = op.Div(op.Where(some, reach, one), _constant(steps, ir.DataType.FLOAT))
    least, most = _constant(qmin, ir.DataType.FLOAT), _constant(qmax, ir.DataType.FLOAT)
    if not symmetric:
        zero_point = op.Clip(op.Sub(least, op.Round(op.Div(low, scale))), least, most)
    q = op.Clip(op.Add(op.Round(op.Div(x, scale)), zero_point), least, most)
    return op.Mul(op.Sub(q, zero_point), scale)


def _operators() -> Any:
    """Return what writes standard operators; its own types do not know integers of 4 bits."""
    from onnxscript import opset21

    return opset21


def _one_or_many(values: Any, axis: int | None) -> Any:
    """Return a scalar where there is one value for the whole tensor."""
    op = _operators()

    return op.Reshape(values, _ints([])) if axis is None else values


def _transposed_rows(values: Any, rows: int) -> Any:
    op = _operators()

    return op.Transpose(op.Reshape(values, _ints([rows, -1])), perm=[1, 0])


def _ints(values: list[int]) -> Any:
    import numpy as np
    import onnx_ir as ir

    op = _operators()

    return op.Constant(value=ir.tensor(np.array(values, dtype=np.int64)))


def _constant(value: float, kind: Any) -> Any:
    import numpy as np
    import onnx_ir as ir

    op = _operators()

    return op.Constant(value=ir.tensor(np.array(value, dtype=kind.numpy())))
