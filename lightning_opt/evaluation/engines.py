"""One model in several engines, so that a gain is also given over the best dense one.

PyTorch in eager mode is a weak baseline on a CPU: ONNX Runtime and OpenVINO are often twice as fast with one model. An
engine is asked for as "NAME" or "NAME:bfloat16", NAME being `torch`, `onnxruntime` or `openvino`. The files that are
timed are written by the same code that writes those that ship.
"""

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError, MissingExtraError
from lightning_opt.evaluation.inputs import at_batch, to_dtype
from lightning_opt.export.runner import EagerRunner, Runner
from lightning_opt.forward import Inputs

_NEEDS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
}
_EXTRA = {"onnxruntime": "export", "openvino": "openvino"}
_HAVE_BFLOAT16 = ("torch", "openvino")
_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")


class HalfRunner:
    """Run a copy of a module in PyTorch eager with bfloat16 weights and inputs.

    Args:
        model: In eval mode; it keeps its own precision.
    """

    engine = "torch eager"
    dtype = "bfloat16"

    def __init__(self, model: nn.Module) -> None:
        self._eager = EagerRunner(copy.deepcopy(model).to(torch.bfloat16))

    def bind(self, inputs: Inputs) -> Callable[[], Any]:
        """Cast the inputs once, and return a call that runs the model on them."""
        return self._eager.bind(to_dtype(inputs, torch.bfloat16))

    def predict(self, inputs: Inputs) -> Tensor:
        """Return the model's main tensor in float32."""
        return self._eager.predict(to_dtype(inputs, torch.bfloat16))


def available_engines() -> list[str]:
    """Return the engines that are installed; bfloat16 only where the CPU multiplies it in hardware."""
    found = [name for name in _NEEDS if _installed(name)]
    if cpu_has_bfloat16():
        found += [f"{name}:bfloat16" for name in _HAVE_BFLOAT16 if name in found]
    return found


def chosen_engines(engines: Sequence[str] | str) -> list[str]:
    """Return the engines to build: those asked for, or with "auto" all that are there.

    Raises:
        ConfigError: An unknown engine, or one whose package is missing.
    """
    if engines == "auto":
        return available_engines()
    chosen = [engines] if isinstance(engines, str) else list(engines)
    for engine in chosen:
        name, _, dtype = engine.partition(":")
        if name not in _NEEDS or dtype not in ("", "float32", "bfloat16"):
            raise ConfigError(f"benchmark.engines={engine}: choose from auto, {', '.join(_NEEDS)}, NAME:bfloat16")
        if dtype == "bfloat16" and name not in _HAVE_BFLOAT16:
            raise ConfigError(f"benchmark.engines={engine}: it has no bfloat16 on CPUs; ask for {name} alone")
        if not _installed(name):
            raise MissingExtraError(name, extra=_EXTRA[name], needed_for=f"benchmark.engines={engine}")
    return chosen


def cpu_has_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware; where it does not, it is slower than fp32 and no rival."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(flag in flags for flag in _BFLOAT16_FLAGS)


def build_runners(
    model: nn.Module, example_inputs: Inputs, engines: Sequence[str], *, threads: int, folder: Path
) -> tuple[list[Runner], dict[str, str]]:
    """Return a model in each engine that can run it, and for each that cannot its reason.

    Args:
        model: In eval mode, on the CPU unless PyTorch alone is asked for.
        example_inputs: Any batch.
        engines: From `chosen_engines`.
        threads: Of the engines outside PyTorch; hold PyTorch's own with `fixed_threads`.
        folder: An empty one, for the files that engines read.
    """
    runners: list[Runner] = []
    reasons: dict[str, str] = {}
    for engine in engines:
        try:
            runner = _build(model, example_inputs, engine, threads=threads, folder=folder)
            runner.predict(at_batch(example_inputs, 2))  # what cannot run says so here, not while it is timed
        except Exception as error:  # engines refuse operators in ways of their own: then they are no rivals
            lines = str(error).strip().splitlines() or [""]
            reasons[engine] = f"{type(error).__name__}: {lines[0][:200]}"
        else:
            runners.append(runner)
    return runners, reasons


def _build(model: nn.Module, example_inputs: Inputs, engine: str, *, threads: int, folder: Path) -> Runner:
    from lightning_opt.export.onnx import OnnxRunner, write_onnx
    from lightning_opt.export.openvino import OpenVinoRunner, write_openvino
    from lightning_opt.export.program import export_program

    name, _, dtype = engine.partition(":")
    if name == "torch":
        return HalfRunner(model) if dtype == "bfloat16" else EagerRunner(model)
    program = export_program(model, example_inputs, engines=True)
    if name == "onnxruntime":
        return OnnxRunner(write_onnx(program, folder / "model.onnx"), threads=threads)
    return OpenVinoRunner(write_openvino(program, folder / "model.xml"), threads=threads, dtype=dtype or "float32")


def _installed(name: str) -> bool:
    return all(find_spec(package) is not None for package in _NEEDS[name])
