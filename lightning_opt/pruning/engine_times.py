"""Time a layer inside the engine that will run it: ONNX Runtime or OpenVINO, one thread.

Both say how long each kernel took. What they add around a lone layer (bringing its input into their own layout and
back) does not happen between the layers of a model, and is left out.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_opt.export.onnx import require_onnx_writer, require_onnxruntime
from lightning_opt.export.openvino import require_openvino

_OPSET, _IR_VERSION = 17, 8  # read by every ONNX Runtime of the last years


def time_in_onnxruntime(layer: nn.Module, x: Tensor, *, repeats: int = 5) -> float:
    """Time a convolution or linear layer in ONNX Runtime, in milliseconds: its kernels, each at its least of all runs.

    For `MeasuredTimes(time_in_onnxruntime, step=8)`.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: The layer is neither a convolution nor linear.
    """
    require_onnxruntime()
    import onnxruntime

    model = onnx_layer(layer, x)
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level, options.enable_profiling = 3, True
        options.profile_file_prefix = str(Path(folder) / "layer")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(repeats):
            session.run(None, {"x": x.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if name.endswith("_kernel_time") and not name.startswith("Reorder"):
            found[name].append(float(event["dur"]) / 1e3)
    return sum(min(times) for times in found.values())


def time_in_openvino(layer: nn.Module, x: Tensor, *, repeats: int = 5) -> float:
    """Time a convolution or linear layer in OpenVINO in float32, as `time_in_onnxruntime` does.

    Raises:
        MissingExtraError: openvino, onnx or onnxscript is not installed.
        ValueError: The layer is neither a convolution nor linear.
    """
    require_openvino()
    import openvino

    core = openvino.Core()
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": "1",
        "PERF_COUNT": True,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(onnx_layer(layer, x)), "CPU", options).create_infer_request()
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        request.infer({"x": x.numpy()}, share_inputs=True, share_outputs=True)
        for kernel in request.profiling_info:
            if kernel.node_type not in ("Reorder", "Parameter", "Result", "Const", "Constant"):
                found[kernel.node_name].append(kernel.real_time.total_seconds() * 1e3)
    return sum(min(times) for times in found.values())


def onnx_layer(layer: nn.Module, x: Tensor) -> bytes:
    """Write a convolution or linear layer with a ReLU behind it as an ONNX model that takes "x" of the shape of `x`.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ValueError: The layer is neither.
    """
    require_onnx_writer()
    from onnx import TensorProto, helper, numpy_helper

    if not isinstance(layer, _ConvNd | nn.Linear) or getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"layer must be a convolution padded with zeros or a linear layer, not {layer}")
    weight = layer.weight.detach()
    given = {"w": weight if isinstance(layer, _ConvNd) else weight.t().contiguous()}
    if layer.bias is not None:
        given["b"] = layer.bias.detach()
    if isinstance(layer, _ConvNd):
        operator = "ConvTranspose" if isinstance(layer, _ConvTransposeNd) else "Conv"
        nodes = [helper.make_node(operator, ["x", *given], ["y"], **_options(layer))]
    else:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p" if "b" in given else "y"])]
        nodes += [helper.make_node("Add", ["p", "b"], ["y"])] if "b" in given else []
    graph = helper.make_graph(
        [*nodes, helper.make_node("Relu", ["y"], ["z"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value.float().numpy(), name) for name, value in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())


def _options(layer: _ConvNd) -> dict[str, Any]:
    if not all(isinstance(each, int) for each in layer.padding):
        raise ValueError(f"padding={layer.padding!r}: give numbers, so that the engine's layer is the same")
    pads = [int(each) for each in layer.padding]
    return {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "dilations": list(layer.dilation),
        "pads": pads + pads,
        "group": layer.groups,
    }
