"""What runs a model for comparison and timing: the model itself here, files in the rooms beside."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs, forward, predict


class Runner(Protocol):
    """Runs a model in one engine.

    Attributes:
        engine: As in the record, such as "ONNX Runtime".
        dtype: What it computes in, such as "float32".
    """

    engine: str
    dtype: str

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        """Return a call without arguments that runs the model on `inputs`, conversions done beforehand."""

    def predict(self, inputs: Inputs) -> Tensor:
        """Return the model's main tensor on the CPU, in float32."""


class EagerRunner:
    """Runs a module in PyTorch eager, as it is.

    Args:
        model: In eval mode, on the CPU.
    """

    engine = "torch eager"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        first = next(model.parameters(), None)
        self.dtype = str(torch.float32 if first is None else first.dtype).removeprefix("torch.")

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        return lambda: forward(self._model, inputs)

    def predict(self, inputs: Inputs) -> Tensor:
        with torch.inference_mode():
            return predict(self._model, inputs).float().clone()
