"""Count the layers of a file that engines really compute in integers."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_opt.export.onnx_checks import check_onnx, check_openvino

Count = tuple[int, int]
"""(layers of integers, all layers)."""

_ORT_INTEGER = frozenset(
    (
        "QLinearConv",
        "ConvInteger",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "DynamicQuantizeMatMul",
    )
)
_ORT_FLOAT = frozenset(
    ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits")
)
_WEIGHT_OF = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
_THROUGH = frozenset(("DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity"))
_OPENVINO_LAYERS = frozenset(("Convolution", "Deconvolution", "FullyConnected"))


def fused_layers(path: str | Path) -> dict[str, Count]:
    """Let each installed engine optimize a file, and count convolutions and linear layers by what they compute with.

    A layer is a convolution or a matrix product with a constant weight. Weights that are kept as integers and computed
    with as floats do not count as integers.

    Args:
        path: An `.onnx` file (ONNX Runtime and OpenVINO), or an OpenVINO `.xml` file.

    Returns:
        `{"onnxruntime": (integer layers, all layers), "openvino": ...}`, without engines that cannot be asked.

    Raises:
        UntrustedInputError: The file reads others outside its folder.
        StorageError: The file is missing or damaged.
    """
    path = Path(path)
    found = {}
    if path.suffix == ".onnx" and _installed("onnxruntime"):
        check_onnx(path)
        found["onnxruntime"] = _in_onnxruntime(path)
    if _installed("openvino"):
        check_openvino(path)
        found["openvino"] = _in_openvino(path)
    return found


def _in_onnxruntime(path: Path) -> Count:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    kinds = [node.op_type for node in graph.node if _has_weight(node, constants, makers)]
    integer = sum(kind in _ORT_INTEGER for kind in kinds)
    return integer, integer + sum(kind in _ORT_FLOAT for kind in kinds)


def _has_weight(node: Any, constants: set[str], makers: dict[str, Any]) -> bool:
    """Tell whether what a node multiplies with is constant, perhaps after it is widened or transposed."""
    place = _WEIGHT_OF.get(node.op_type, 1)
    name = node.input[place] if len(node.input) > place else ""
    while name not in constants:
        maker = makers.get(name)
        if maker is None or maker.op_type not in (*_THROUGH, "Constant"):
            return False
        if maker.op_type == "Constant":
            return True
        name = maker.input[0]
    return True


def _in_openvino(path: Path) -> Count:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    integer = total = 0
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        kind = about["layerType"].astype(str) if "layerType" in about else node.get_type_name()
        if kind in _OPENVINO_LAYERS:
            total += 1
            integer += about["primitiveType"].astype(str).lower().endswith("_i8")
    return integer, total


def _installed(package: str) -> bool:
    return find_spec(package) is not None
