"""torchao's `quantize_`: linear layers with weights only or with dynamic activations, in PyTorch."""

import copy
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_opt.export.program import quiet
from lightning_opt.export.runner import EagerRunner
from lightning_opt.forward import Inputs
from lightning_opt.quantization.backends.base import Kind, QuantizedModel, refusals, require, understood
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.scheme import Scheme


@dataclass(frozen=True)
class TorchAO:
    """Quantize with torchao: only linear layers, either their weights alone or with dynamic activations.

    Args:
        compile: Run the model through `torch.compile`; without that, torchao's integers are slower than floats.
    """

    name: ClassVar[str] = "torchao"
    compile: bool = True

    def check(self) -> None:
        """Make sure that torchao is installed.

        Raises:
            MissingExtraError: It is not.
        """
        require("torchao", extra="peers", backend=self.name)

    def quantize(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        scheme: Scheme | str = "w8a8_dynamic",
        *,
        calibration: Iterable[Any] | None = None,
        folder: Path,
    ) -> QuantizedModel:
        """Quantize a copy of a model; see `Backend`."""
        self.check()
        scheme, kind = understood(scheme, backend=self.name, kinds=("dynamic", "weight_only"), weight_bits=(4, 8))
        made = copy.deepcopy(model).eval()
        with quiet(), refusals(self.name, model):
            from torchao.quantization import quantize_

            quantize_(made, _config(kind, scheme.weight))
        saved = io.BytesIO()
        torch.save(made.state_dict(), saved)
        runner = _CompiledRunner(made) if self.compile else EagerRunner(made)
        return QuantizedModel(backend=self.name, kind=kind, runner=runner, size_bytes=saved.tell())


class _CompiledRunner:
    """Runs a module through `torch.compile`.

    Args:
        model: In eval mode, on the CPU.
    """

    engine = "torch compiled"

    def __init__(self, model: nn.Module) -> None:
        self._eager = EagerRunner(torch.compile(model))  # type: ignore[arg-type]
        self.dtype = self._eager.dtype

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        call = self._eager.bind(inputs)
        with torch.inference_mode():
            call()  # compiles
        return call

    def predict(self, inputs: Inputs) -> Tensor:
        return self._eager.predict(inputs)


def _config(kind: Kind, weight: Grid | None) -> Any:
    from torchao import quantization as ao

    bits, size = (8, None) if weight is None else (weight.bits, weight.group_size)
    if bits == 8 and size is None:
        return ao.Int8DynamicActivationInt8WeightConfig() if kind == "dynamic" else ao.Int8WeightOnlyConfig()
    dtype, granularity = getattr(torch, f"int{bits}"), ao.PerAxis(axis=0) if size is None else ao.PerGroup(size)
    if kind == "dynamic":
        return ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return ao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
