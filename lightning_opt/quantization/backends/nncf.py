"""OpenVINO with NNCF: Intel's own post-training quantization, as a second opinion."""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lightning_opt.evaluation.size import bytes_on_disk
from lightning_opt.export.files import publish, storing
from lightning_opt.export.openvino import OpenVinoRunner, no_usage_data, write_openvino
from lightning_opt.export.program import export_program, quiet, tensors_of
from lightning_opt.forward import Inputs, batch_size_of
from lightning_opt.quantization.backends.base import Kind, QuantizedModel, refusals, require, understood
from lightning_opt.quantization.calibration import CalibrationError, collect
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.scheme import Scheme


@dataclass(frozen=True)
class Nncf:
    """Quantize with NNCF for OpenVINO: static with calibration, or weights only.

    Args:
        transformer: Whether the model is a transformer, which NNCF treats in a way of its own; None: whether it has
            layer norms.
        threads: CPU threads of the engine.
    """

    name: ClassVar[str] = "nncf"
    transformer: bool | None = None
    threads: int = 1

    def check(self) -> None:
        """Make sure that OpenVINO and NNCF are installed.

        Raises:
            MissingExtraError: One is not.
        """
        require("openvino", "nncf", extra="openvino", backend=self.name)

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
        scheme, kind = understood(scheme, backend=self.name, kinds=("static", "weight_only"), weight_bits=(4, 8))
        if kind == "static" and scheme.weight is not None and scheme.weight.bits != 8:
            understood(scheme, backend=self.name, kinds=("weight_only",), weight_bits=(4, 8))
        batches = [] if calibration is None else collect(calibration, example_inputs)
        if kind == "static" and not batches:
            raise CalibrationError(f"backend {self.name} needs calibration=batches for a static scheme")
        is_transformer = self._is_transformer(model)
        path = folder / "model.xml"
        with storing(path), tempfile.TemporaryDirectory(dir=folder, prefix=".nncf-") as scratch:
            source = write_openvino(export_program(model, example_inputs), Path(scratch) / "float.xml")
            with quiet(), no_usage_data("NNCF_CI"), refusals(self.name, model):
                _write(source, Path(scratch) / path.name, kind, scheme.weight, batches, is_transformer)
            for part in (path.with_suffix(".bin"), path):  # the weights first: the .xml is what is opened
                publish(Path(scratch) / part.name, part)
        return QuantizedModel(
            backend=self.name,
            kind=kind,
            runner=OpenVinoRunner(path, threads=self.threads),
            size_bytes=bytes_on_disk(path) + bytes_on_disk(path.with_suffix(".bin")),
            path=path,
        )

    def _is_transformer(self, model: nn.Module) -> bool:
        if self.transformer is not None:
            return self.transformer
        return any(isinstance(module, nn.LayerNorm | nn.RMSNorm) for module in model.modules())


def _write(
    source: Path, target: Path, kind: Kind, weight: Grid | None, batches: Sequence[Inputs], is_transformer: bool
) -> None:
    import nncf
    import openvino

    floats = openvino.Core().read_model(str(source))
    if kind == "static":
        feeds = [[tensor.numpy() for tensor in tensors_of(batch)] for batch in batches]
        made = nncf.quantize(
            floats,
            nncf.Dataset(feeds),
            subset_size=max(sum(map(batch_size_of, batches)), 1),
            model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
        )
    else:
        made = nncf.compress_weights(floats, **_weight_options(nncf, weight))
    openvino.save_model(made, target, compress_to_fp16=False)


def _weight_options(nncf: Any, weight: Grid | None) -> dict[str, Any]:
    if weight is None or weight.bits == 8:
        return {"mode": nncf.CompressWeightsMode.INT8_SYM}
    return {
        "mode": nncf.CompressWeightsMode.INT4_SYM,
        "group_size": weight.group_size or -1,
        "ratio": 1.0,
        "all_layers": True,
    }
