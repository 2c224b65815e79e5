"""ONNX Runtime's own quantization of an ONNX file."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lightning_opt.evaluation.size import bytes_on_disk
from lightning_opt.export.files import publish, storing
from lightning_opt.export.onnx import OnnxRunner, write_onnx
from lightning_opt.export.program import export_program, quiet, tensors_of
from lightning_opt.forward import Inputs
from lightning_opt.quantization.backends.base import QuantizedModel, refusals, require, understood
from lightning_opt.quantization.calibration import CalibrationError, collect
from lightning_opt.quantization.scheme import Scheme


@dataclass(frozen=True)
class OnnxRuntime:
    """Quantize with `onnxruntime.quantization`: static in pairs of quantize and dequantize, or dynamic.

    Activations are unsigned: ONNX Runtime is several times slower on CPUs with signed ones.

    Args:
        threads: CPU threads of the engine.
    """

    name: ClassVar[str] = "onnxruntime"
    threads: int = 1

    def check(self) -> None:
        """Make sure that ONNX Runtime and what writes ONNX are installed.

        Raises:
            MissingExtraError: One is not.
        """
        require("onnx", "onnxscript", "onnxruntime", extra="export", backend=self.name)

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
        scheme, kind = understood(scheme, backend=self.name, kinds=("static", "dynamic"), weight_bits=(8,))
        batches = [] if calibration is None else collect(calibration, example_inputs)
        if kind == "static" and not batches:
            raise CalibrationError(f"backend {self.name} needs calibration=batches for a static scheme")
        path = folder / "model.onnx"
        with storing(path), tempfile.TemporaryDirectory(dir=folder, prefix=".onnxruntime-") as scratch:
            floats = write_onnx(export_program(model, example_inputs), Path(scratch) / "float.onnx")
            draft = Path(scratch) / path.name
            with quiet(), refusals(self.name, model):
                if kind == "static":
                    _static(floats, draft, batches)
                else:
                    _dynamic(floats, draft)
            publish(draft, path)
        return QuantizedModel(
            backend=self.name,
            kind=kind,
            runner=OnnxRunner(path, threads=self.threads),
            size_bytes=bytes_on_disk(path),
            path=path,
        )


def _static(source: Path, target: Path, batches: Sequence[Inputs]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    prepared = _prepared(source)
    quantize_static(
        prepared,
        target,
        _reader(prepared, batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_prepared(source), target, per_channel=True, weight_type=QuantType.QInt8)


def _prepared(source: Path) -> Path:
    """Fold and fuse what ONNX Runtime wants folded before it quantizes, such as batch norms."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    return prepared


def _reader(path: Path, batches: Sequence[Inputs]) -> Any:
    """Return what gives the calibration data to ONNX Runtime, by the names of the file's inputs."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in constants]

    class Reader(CalibrationDataReader):
        """Gives one batch after the other, as often as it is asked to begin anew."""

        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._feeds: Iterator[dict[str, Any]] = iter(
                {name: tensor.numpy() for name, tensor in zip(names, tensors_of(batch), strict=True)}
                for batch in batches
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    return Reader()
