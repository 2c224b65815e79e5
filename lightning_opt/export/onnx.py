"""Write a traced program as an ONNX file, and run it in ONNX Runtime."""

import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lightning_opt.errors import MissingExtraError
from lightning_opt.export.cpu import multiplies_int8_exactly
from lightning_opt.export.files import publish, storing
from lightning_opt.export.onnx_checks import check_onnx
from lightning_opt.export.program import quiet, tensors_of
from lightning_opt.export.quantized_onnx import onnx_of
from lightning_opt.forward import Inputs

MAX_INLINE_BYTES = 1_500_000_000
"""An ONNX file ends at 2 GB: larger weights go into `<name>.data` beside it."""


def require_onnx_writer() -> None:
    """Make sure that what writes ONNX is there.

    Raises:
        MissingExtraError: It is not.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(package, extra="export", needed_for="the ONNX format")


def require_onnxruntime() -> None:
    """Make sure that ONNX Runtime is there.

    Raises:
        MissingExtraError: It is not.
    """
    if find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", extra="export", needed_for="running an ONNX file")


def write_onnx(
    program: ExportedProgram, path: Path, *, max_inline_bytes: int = MAX_INLINE_BYTES, dynamic: bool = True
) -> Path:
    """Write `program` to `path`, durably; inputs keep their names, the output is called "logits".

    Args:
        program: From `export_program`; for a quantized model with `engines=True`, so that integers stay integers.
        path: The `.onnx` file.
        max_inline_bytes: Weights that take more go into a file of their own, `path` with ".data" at its end.
        dynamic: Keep the quantization of values whose range is found as they come; see `onnx_of`.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        StorageError: The files could not be written.
    """
    require_onnx_writer()
    size_bytes = sum(tensor.nbytes for tensor in (*program.state_dict.values(), *program.constants.values()))
    with storing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder:
        made = onnx_of(program, dynamic=dynamic)
        with quiet():
            made.save(os.path.join(folder, path.name), external_data=size_bytes > max_inline_bytes)
        draft, data = Path(folder) / path.name, path.with_name(f"{path.name}.data")
        data.unlink(missing_ok=True)  # of an older model
        if (Path(folder) / data.name).exists():  # before the file that reads it
            publish(Path(folder) / data.name, data)
        publish(draft, path)
    return path


class OnnxRunner:
    """Runs an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: The file; it may come from elsewhere.
        threads: CPU threads.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UntrustedInputError: The file reads others outside its folder.
    """

    engine = "ONNX Runtime"
    dtype = "float32"

    def __init__(self, path: Path, *, threads: int) -> None:
        require_onnxruntime()
        import onnxruntime

        check_onnx(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Threads that wait for work by spinning would slow whatever is measured next to them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if not multiplies_int8_exactly():  # exact sums are slower; wrong answers would be of no use
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._names = [port.name for port in self._session.get_inputs()]

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        feed = {name: tensor.numpy() for name, tensor in zip(self._names, tensors_of(inputs), strict=True)}
        return lambda: self._session.run(None, feed)

    def predict(self, inputs: Inputs) -> Tensor:
        return torch.from_numpy(self.bind(inputs)()[0]).float()
