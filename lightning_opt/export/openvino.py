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
from lightning_opt.export.files import publish, storing
from lightning_opt.export.program import OUTPUT_NAME, program_inputs, program_shapes, quiet, tensors_of
from lightning_opt.forward import Inputs

_PRECISION = {"float32": "f32", "bfloat16": "bf16"}


def require_openvino() -> None:
    """Make sure that OpenVINO is there.

    Raises:
        MissingExtraError: It is not.
    """
    if find_spec("openvino") is None:
        raise MissingExtraError("openvino", extra="openvino", needed_for="the OpenVINO format and engine")


def write_openvino(program: ExportedProgram, path: Path) -> Path:
    """Write `program` to `path` (`.xml`) and its weights beside it (`.bin`), in the precision that they have.

    Raises:
        MissingExtraError: openvino is not installed.
        StorageError: The files could not be written.
    """
    require_openvino()
    import openvino

    with storing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".openvino-") as folder:
        draft = Path(folder) / path.name
        with quiet(), _no_usage_data():
            converted = openvino.convert_model(program)
        # The converter forgets which axes are fixed; the engine plans better when it knows them.
        converted.reshape(dict(zip(converted.inputs, map(openvino.PartialShape, program_shapes(program)), strict=True)))
        for port, name in zip(converted.inputs, program_inputs(program), strict=True):
            port.get_tensor().set_names({name})
        converted.outputs[0].get_tensor().set_names({OUTPUT_NAME})
        openvino.save_model(converted, draft, compress_to_fp16=False)
        for part in sorted(Path(folder).iterdir()):  # the weights first: the .xml is what is opened
            publish(part, path.with_name(part.name))
    return path


@contextlib.contextmanager
def _no_usage_data() -> Iterator[None]:
    """Keep the converter from sending usage data: it leaves that out where it believes to be in a build machine."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        os.environ.pop("CI")
        if before is not None:
            os.environ["CI"] = before


class OpenVinoRunner:
    """Runs an IR or ONNX file in OpenVINO on the CPU, one request at a time.

    Args:
        path: The `.xml` or `.onnx` file.
        threads: CPU threads.
        dtype: "float32" or "bfloat16": in what it computes. Said outright, since OpenVINO would choose bfloat16 by
            itself on some CPUs and the comparison would not be one of equals.

    Raises:
        MissingExtraError: openvino is not installed.
    """

    engine = "OpenVINO"

    def __init__(self, path: Path, *, threads: int, dtype: str = "float32") -> None:
        require_openvino()
        import openvino

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
