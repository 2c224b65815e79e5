"""Rewrite an ONNX graph so that ONNX Runtime and OpenVINO compute its quantized layers in integers.

Each engine joins "dequantize, compute, quantize" to one integer operator only where the graph has the form that it
looks for. The rewrites here keep the values that a graph computes (but for the rounding of a bias) and bring it to the
forms that both engines were seen to join.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

_MOVES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"))
_FOLDED = frozenset(("Cast", "Reshape", "Transpose"))
_JOINED_TO_GEMM = frozenset(
    ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "HardSigmoid", "Softplus", "Softsign", "ThresholdedRelu")
)
_MIN_TIED_VALUES = 64
_INT32_LIMIT = float(2**31 - 1)


def fold_constants(graph: Any) -> None:
    """Compute what follows from constants alone: casts, reshapes and transposes of scales and zero points."""
    for node in list(graph):
        if node.op_type not in _FOLDED or node.domain or not all(is_constant(each) for each in node.inputs):
            continue
        made = constant(graph, _computed(node), node.outputs[0].name)
        node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def merge_tied(graph: Any) -> None:
    """Keep the integers of tied weights, such as a table that is also a head, once."""
    seen: dict[tuple[Any, ...], Any] = {}
    for value in list(graph.initializers.values()):
        if str(value.dtype) not in ("INT8", "UINT8") or value.const_value.size < _MIN_TIED_VALUES:
            continue
        kept = seen.setdefault(_key(array_of(value)), value)
        if kept is not value:
            value.replace_all_uses_with(kept)


def merge_repeated(graph: Any) -> None:
    """Keep one of several nodes that quantize or dequantize the same value in the same way."""
    seen: dict[tuple[Any, ...], Any] = {}
    for node in list(graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            continue
        key = (node.op_type, *map(_identity, node.inputs), *_attributes(node))
        kept = seen.setdefault(key, node)
        if kept is not node:
            for old, new in zip(node.outputs, kept.outputs, strict=True):
                old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def skip_second_rounding(graph: Any) -> None:
    """Drop what rounds a value again to the grid that it is on already."""
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or (before := node.inputs[0].producer()) is None:
            continue
        if before.op_type != "DequantizeLinear":
            continue
        same = list(map(_identity, before.inputs[1:])) == list(map(_identity, node.inputs[1:]))
        if same and before.inputs[0].dtype == node.outputs[0].dtype:
            node.outputs[0].replace_all_uses_with(before.inputs[0])
            graph.remove(node, safe=True)


def move_integers(graph: Any) -> None:
    """Reshape and transpose integers rather than the values they stand for, so that readers find the integers."""
    import onnx_ir as ir

    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type in _MOVES and not node.domain else None
        if before is None or not is_activation(before):
            continue
        moved = ir.node(node.op_type, [before.inputs[0], *node.inputs[1:]], node.attributes.copy())
        moved.outputs[0].dtype, moved.outputs[0].shape = before.inputs[0].dtype, node.outputs[0].shape
        back = ir.node("DequantizeLinear", [moved.outputs[0], *before.inputs[1:]])
        graph.insert_before(node, [moved, back])
        take_place(graph, back.outputs[0], node.outputs[0])


def join_integers(graph: Any) -> None:
    """Quantize what is joined before it is joined, to the grid that the whole is on: the same values.

    What makes the parts is then followed by integers, without which ONNX Runtime computes it in float.
    """
    for node in list(graph):
        readers = [use.node for use in node.outputs[0].uses()] if node.op_type == "Concat" else []
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or not _is_plain(readers[0]):
            continue
        grid = readers[0].inputs[1:]
        for index, part in enumerate(node.inputs):
            before = part.producer()
            if before is None or is_constant(part) or is_activation(before):
                continue
            q = insert(graph, node, "QuantizeLinear", [part, *grid])
            node.replace_input_with(index, insert(graph, node, "DequantizeLinear", [q, *grid]))


def _is_plain(quantizes: Any) -> bool:
    return len(quantizes.inputs) == 3 and is_constant(quantizes.inputs[1]) and array_of(quantizes.inputs[1]).size == 1


def pool_integers(graph: Any) -> None:
    """Write the mean over a whole picture as the pooling that engines know for integers."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2 or not is_constant(node.inputs[1]):
            continue
        before, shape = node.inputs[0].producer(), node.inputs[0].shape
        if before is None or not is_activation(before) or shape is None or len(shape) < 3:
            continue
        axes = sorted(int(axis) % len(shape) for axis in array_of(node.inputs[1]).reshape(-1))
        keeps = node.attributes.get_int("keepdims", 1)
        if axes == list(range(2, len(shape))) and keeps:
            take_place(graph, insert(graph, node, "GlobalAveragePool", [node.inputs[0]]), node.outputs[0])


def integer_biases(graph: Any) -> None:
    """Give the bias of a matrix product as int32, without which ONNX Runtime computes the product in float."""
    for node in list(graph):
        if node.op_type != "Gemm" or len(node.inputs) < 3 or not is_constant(node.inputs[2]):
            continue
        x, weight = node.inputs[0].producer(), node.inputs[1].producer()
        if x is None or weight is None or not is_activation(x) or not is_weight(weight):
            continue
        bias, scale = array_of(node.inputs[2]), array_of(weight.inputs[1]).reshape(-1)
        if bias.ndim != 1 or scale.size not in (1, bias.size):
            continue
        scale = np.broadcast_to((array_of(x.inputs[1]) * scale).astype(np.float32), bias.shape)
        steps = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
        if not np.all(np.abs(steps) <= _INT32_LIMIT):
            continue
        name = node.inputs[2].name
        inputs = [constant(graph, steps.astype(np.int32), f"{name}_int32"), constant(graph, scale, f"{name}_scale")]
        node.replace_input_with(2, insert(graph, node, "DequantizeLinear", inputs, axis=0))


def part_functions(graph: Any) -> None:
    """Keep ONNX Runtime from joining an integer matrix product with a function of its result to a product of floats."""
    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type in _JOINED_TO_GEMM else None
        if before is None or before.op_type != "Gemm" or not is_activation_of(before):
            continue
        readers = [use.node.op_type for use in node.outputs[0].uses()]
        if readers != ["QuantizeLinear"] or node.op_type != "Relu":
            node.replace_input_with(0, insert(graph, node, "Max", [node.inputs[0]]))


def drop_zero_points(graph: Any) -> None:
    """Subtract nothing where the zero points that are looked up are all 0."""
    for node in list(graph):
        if node.op_type == "Sub" and _looks_up_zeros(node.inputs[1]):
            node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)


def drop_dynamic(graph: Any) -> None:
    """Let layers read plain values instead of values that are quantized as they come."""
    for node in list(graph):
        if node.op_type == "DynamicQuantizeLinear":
            for reader in [use.node for use in node.outputs[0].uses()]:
                reader.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)


def remove_unused(model: Any) -> None:
    """Remove nodes and constants that nothing reads."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)


def is_activation(node: Any) -> bool:
    """Tell whether a node gives the values of integers that are computed, with one scale for all."""
    if node.op_type != "DequantizeLinear" or is_constant(node.inputs[0]) or not is_constant(node.inputs[1]):
        return False
    return array_of(node.inputs[1]).size == 1


def is_activation_of(layer: Any) -> bool:
    """Tell whether a layer reads values of integers that are computed, with one scale for all."""
    before = layer.inputs[0].producer()
    return before is not None and is_activation(before)


def is_weight(node: Any) -> bool:
    """Tell whether a node gives the values of integers that are known."""
    return node.op_type == "DequantizeLinear" and is_integer_constant(node.inputs[0]) and is_constant(node.inputs[1])


def is_integer_constant(value: Any) -> bool:
    """Tell whether a value is known, or known integers of 4 bits that are widened when the file is read."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        return is_constant(producer.inputs[0])
    return is_constant(value)


def is_constant(value: Any) -> bool:
    """Tell whether a value is known."""
    import onnx_ir as ir

    return value is not None and ir.convenience.get_const_tensor(value) is not None


def array_of(value: Any) -> Any:
    """Return a known value; integers of 4 bits as their narrow type."""
    import onnx_ir as ir

    tensor: Any = ir.convenience.get_const_tensor(value)
    return tensor.numpy()


def constant(graph: Any, array: Any, name: str) -> Any:
    """Return a new known value of a graph, also where there is an equal one.

    ONNX Runtime makes new names of those of a layer's constants, and fails where two layers share one.
    """
    import onnx_ir as ir

    array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
    taken, free = graph.initializers, name
    while free in taken or any(each.name == free for each in graph.inputs):
        free += "_"
    tensor = ir.tensor(array, name=free)
    made = ir.Value(name=free, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)
    return made


def insert(graph: Any, before: Any, kind: str, inputs: Iterable[Any], **attributes: Any) -> Any:
    """Put a node in front of another one and return its value."""
    import onnx_ir as ir

    made = ir.node(kind, list(inputs), attributes)
    graph.insert_before(before, made)
    return made.outputs[0]


def take_place(graph: Any, new: Any, old: Any) -> None:
    """Let all who read the only value of a node read another one, which takes over its name; the node goes."""
    node, name, old.name = old.producer(), old.name, None
    new.shape = old.shape if old.shape is not None else new.shape
    if old.dtype is not None:
        new.dtype = old.dtype
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _computed(node: Any) -> Any:
    import onnx_ir as ir

    x = array_of(node.inputs[0])
    if node.op_type == "Cast":
        return x.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    if node.op_type == "Transpose":
        return x.transpose(node.attributes["perm"].as_ints()) if "perm" in node.attributes else x.transpose()
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(array_of(node.inputs[1]).tolist())])


def _looks_up_zeros(value: Any) -> bool:
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Reshape"):
        value, node = node.inputs[0], node.inputs[0].producer()
    if node is not None and node.op_type == "Gather":
        value = node.inputs[0]
    return is_constant(value) and not array_of(value).any()


def _identity(value: Any) -> Any:
    """Return what two values have in common that are sure to be equal."""
    if value is None or not is_constant(value):
        return id(value)
    array = array_of(value)
    return _key(array) if array.nbytes < 4096 else id(value)


def _key(array: Any) -> tuple[Any, ...]:
    return str(array.dtype), array.shape, hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def _attributes(node: Any) -> tuple[Any, ...]:
    usual = {"axis": 1, "block_size": 0, "saturate": 1, "output_dtype": 0}
    return tuple(sorted((k, v.value) for k, v in node.attributes.items() if usual.get(k) != v.value))
