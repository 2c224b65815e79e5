"""Write a traced program as OpenVINO IR (`.xml` with its `.bin`), and run it in OpenVINO."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lightning_opt.errors import MissingExtraError
from lightning_opt.export.files import make_folder, publish, storing
from lightning_opt.export.onnx import write_onnx
from lightning_opt.export.onnx_checks import check_openvino
from lightning_opt.export.program import OUTPUT_NAME, program_inputs, program_shapes, quiet, tensors_of
from lightning_opt.export.quantized_ops import holds_quantization
from lightning_opt.forward import Inputs

_PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def require_openvino() -> None:
    """Make sure that OpenVINO is there.

    Raises:
        MissingExtraError: It is not.
    """
    if find_spec("openvino") is None:
        raise MissingExtraError("openvino", extra="openvino", needed_for="the OpenVINO format and engine")


def write_openvino(program: ExportedProgram, path: Path, *, source: Path | None = None) -> Path:
    """Write `program` to `path` (`.xml`) and its weights beside it (`.bin`), in the precision that they have.

    A program with quantization (`export_program(..., engines=True)`) takes the way through an ONNX file, in which the
    integers are as the engine wants them.

    Args:
        program: From `export_program`.
        path: The `.xml` file.
        source: The ONNX file of this program, where there is one already that holds no ranges found as values come.

    Raises:
        MissingExtraError: openvino is not installed.
        StorageError: The files could not be written.
    """
    require_openvino()
    import openvino

    with storing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".openvino-") as folder:
        draft = Path(folder) / path.name
        if source is None and holds_quantization(program):
            make_folder(Path(folder) / "source")
            source = write_onnx(program, Path(folder) / "source" / "model.onnx", dynamic=False)
        with quiet(), no_usage_data():
            converted = openvino.convert_model(program if source is None else source)
        _drop_zero_points(converted)
        # The converter forgets which axes are fixed; the engine plans better when it knows them.
        converted.reshape(dict(zip(converted.inputs, map(openvino.PartialShape, program_shapes(program)), strict=True)))
        for port, name in zip(converted.inputs, program_inputs(program), strict=True):
            port.get_tensor().set_names({name})
        converted.outputs[0].get_tensor().set_names({OUTPUT_NAME})
        openvino.save_model(converted, draft, compress_to_fp16=False)
        for part in sorted(
            each for each in Path(folder).iterdir() if each.is_file()
        ):  # the weights first: the .xml is what is opened
            publish(part, path.with_name(part.name))
    return path


def _drop_zero_points(model: Any) -> None:
    """Remove subtractions of 0 from weights: layers that share such a constant would be computed in float."""
    for node in model.get_ops():
        if node.get_type_name() != "Subtract":
            continue
        value = node.input_value(1).get_node()
        while value.get_type_name() in ("Convert", "Reshape"):
            value = value.input_value(0).get_node()
        if value.get_type_name() == "Constant" and not value.data.any():
            node.output(0).replace(node.input_value(0))


@contextlib.contextmanager
def no_usage_data(*names: str) -> Iterator[None]:
    """Keep Intel's packages from sending usage data: they leave that out where they believe to be in a build machine.

    Args:
        names: Environment variables that say so, besides CI.
    """
    before = {name: os.environ.get(name) for name in ("CI", *names)}
    os.environ.update(dict.fromkeys(before, "true"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class OpenVinoRunner:
    """Runs an IR or ONNX file in OpenVINO on the CPU, one request at a time.

    Args:
        path: The `.xml` or `.onnx` file; it may come from elsewhere.
        threads: CPU threads.
        dtype: "float32" or "bfloat16": in what it computes. Said outright, since OpenVINO would choose bfloat16 by
            itself on some CPUs and the comparison would not be one of equals.

    Raises:
        MissingExtraError: openvino is not installed.
        UntrustedInputError: The file is a link, or reads others outside its folder.
    """

    engine = "OpenVINO"

    def __init__(self, path: Path, *, threads: int, dtype: str = "float32") -> None:
        require_openvino()
        import openvino

        check_openvino(path)
        self.dtype = dtype
        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
        }
        compiled = openvino.Core().compile_model(str(path), "CPU", options)
        self._names = [port.get_any_name() for port in compiled.inputs]
        self._request = compiled.create_infer_request()

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        feed = {name: tensor.numpy() for name, tensor in zip(self._names, tensors_of(inputs), strict=True)}
        return lambda: self._request.infer(feed, share_inputs=True, share_outputs=True)

    def predict(self, inputs: Inputs) -> Tensor:
        return torch.from_numpy(self.bind(inputs)()[0].copy()).float()
