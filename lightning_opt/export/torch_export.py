"""Write a traced program as a PyTorch `.pt2` file.

`torch.export.load` unpickles constants and some weights, so a `.pt2` file can run code when it is opened. This package
opens only files that it has just written itself, to verify and time them, and never one that came from elsewhere; treat
a foreign `.pt2` like a foreign program.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lightning_opt.export.files import write_durably
from lightning_opt.export.program import quiet, tensors_of
from lightning_opt.forward import Inputs


def write_torch_export(program: ExportedProgram, path: Path) -> Path:
    """Write `program` to `path`, durably.

    Raises:
        StorageError: The file could not be written.
    """

    def write(temporary: Path) -> None:
        # Through an open file: the name of the temporary file does not end in .pt2, which a path must.
        with temporary.open("wb") as file, quiet():
            torch.export.save(program, file)

    write_durably(path, write)
    return path


class TorchExportRunner:
    """Runs a `.pt2` file that this process has written; see the module's warning about foreign files."""

    engine = "torch export"
    dtype = "float32"

    def __init__(self, path: Path) -> None:
        with quiet():
            program = torch.export.load(path)
        args, kwargs = program.example_inputs
        self._names = list(kwargs) if kwargs and not args else None
        self._module: Any = program.module()

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        tensors = tensors_of(inputs)
        if self._names is None:
            return lambda: self._module(*tensors)
        named = dict(zip(self._names, tensors, strict=True))
        return lambda: self._module(**named)

    def predict(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.bind(inputs)()
        return output.float()
