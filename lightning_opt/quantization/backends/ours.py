"""The backend of this package: its own quantization, run by an engine of choice."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from lightning_opt.evaluation.size import bytes_on_disk, safetensors_bytes
from lightning_opt.export.onnx import OnnxRunner, require_onnx_writer, require_onnxruntime, write_onnx
from lightning_opt.export.openvino import OpenVinoRunner, require_openvino, write_openvino
from lightning_opt.export.program import export_program
from lightning_opt.export.runner import EagerRunner
from lightning_opt.forward import Inputs
from lightning_opt.quantization.backends.base import QuantizedModel, kind_of
from lightning_opt.quantization.post_training import Improvement, post_training_scheme, quantize
from lightning_opt.quantization.scheme import Scheme


@dataclass(frozen=True)
class Ours:
    """Quantize with this package.

    Args:
        engine: What runs the result: "onnxruntime", "openvino" or "torch".
        improve: Improvements, as in `lightning_opt.quantization.quantize`.
        threads: CPU threads of the engine.

    Raises:
        ValueError: The engine is not known.
    """

    name: ClassVar[str] = "lightning_opt"
    engine: Literal["onnxruntime", "openvino", "torch"] = "onnxruntime"
    improve: tuple[Improvement, ...] = ()
    threads: int = 1

    def __post_init__(self) -> None:
        if self.engine not in ("onnxruntime", "openvino", "torch"):
            raise ValueError(f"engine={self.engine!r} is not known; known are onnxruntime, openvino and torch")

    def check(self) -> None:
        """Make sure that the engine is installed.

        Raises:
            MissingExtraError: It is not.
        """
        if self.engine == "torch":
            return
        require_onnx_writer()
        if self.engine == "onnxruntime":
            require_onnxruntime()
        else:
            require_openvino()

    def quantize(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        scheme: Scheme | str = "w8a8",
        *,
        calibration: Iterable[Any] | None = None,
        folder: Path,
    ) -> QuantizedModel:
        """Quantize a copy of a model; see `Backend`."""
        self.check()
        scheme = post_training_scheme(scheme)
        made = quantize(model, example_inputs, scheme, calibration=calibration, improve=self.improve)
        if self.engine == "torch":
            runner, path, size_bytes = EagerRunner(made), None, safetensors_bytes(made)
            return QuantizedModel(
                backend=self.name, kind=kind_of(scheme), runner=runner, size_bytes=size_bytes, path=path
            )
        program = export_program(made, example_inputs, engines=True)
        if self.engine == "onnxruntime":
            path = write_onnx(program, folder / "model.onnx")
            return QuantizedModel(
                backend=self.name,
                kind=kind_of(scheme),
                runner=OnnxRunner(path, threads=self.threads),
                size_bytes=bytes_on_disk(path),
                path=path,
            )
        path = write_openvino(program, folder / "model.xml")
        return QuantizedModel(
            backend=self.name,
            kind=kind_of(scheme),
            runner=OpenVinoRunner(path, threads=self.threads),
            size_bytes=bytes_on_disk(path) + bytes_on_disk(path.with_suffix(".bin")),
            path=path,
        )
