"""The same model in several engines, so that a gain is also given over the best dense one.

PyTorch in eager mode is a weak baseline on a CPU: ONNX Runtime and OpenVINO are often twice as fast with one model.
"""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError, MissingExtraError
from lightning_opt.evaluation.inputs import at_batch, to_dtype
from lightning_opt.forward import Inputs, predict

Run = Callable[[Inputs], Tensor]
_PACKAGES = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}
_BF16_WORDS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A model, ready to be called.

    Attributes:
        name: As in the record, such as "torch eager".
        dtype: What it computes in, such as "float32".
        run: Inputs -> the model's main tensor, on the CPU.
        prepare: Inputs -> what `run_prepared` takes, so that a timing leaves conversions out.
        run_prepared: Calls the engine alone.
    """

    name: str
    dtype: str
    run: Run
    prepare: Callable[[Inputs], Any] = field(repr=False)
    run_prepared: Callable[[Any], Any] = field(repr=False)


def installed(engines: Sequence[str] | str) -> list[str]:
    """Return the engines to build: those asked for, or with "auto" all that are installed.

    Raises:
        ConfigError: An unknown engine, or one whose package is missing.
    """
    known = ["torch", *_PACKAGES]
    if engines == "auto":
        return [name for name in known if _has(name)]
    chosen = [engines] if isinstance(engines, str) else list(engines)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"benchmark.engines={name}: choose from auto, {', '.join(known)}")
        if not _has(name):
            extra = "openvino" if name == "openvino" else "export"
            raise MissingExtraError(name, extra=extra, needed_for=f"benchmark.engines={name}")
    return chosen


def _has(name: str) -> bool:
    return all(find_spec(package) is not None for package in _PACKAGES.get(name, ()))


def cpu_has_bf16() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware; without that, bf16 is slower than fp32 and no rival."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(word in flags for word in _BF16_WORDS)


def torch_engine(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> Engine:
    """Return PyTorch's eager mode on a model, or on a copy of it in another dtype."""
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)

    def call(inputs: Inputs) -> Tensor:
        with torch.inference_mode():
            return predict(model, inputs)

    def prepare(inputs: Inputs) -> Inputs:
        return inputs if dtype == torch.float32 else to_dtype(inputs, dtype)

    return Engine(
        name="torch eager",
        dtype=str(dtype).removeprefix("torch."),
        run=lambda inputs: call(prepare(inputs)).float().cpu(),
        prepare=prepare,
        run_prepared=call,
    )


def onnxruntime_engine(model: nn.Module, example_inputs: Inputs, *, threads: int) -> Engine:
    """Return ONNX Runtime on a model, exported in float32 with a free batch axis."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for work by spinning would slow whatever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, example_inputs, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def prepare(inputs: Inputs) -> dict[str, np.ndarray]:
        return dict(zip(names, as_arrays(inputs), strict=True))

    def call(feed: dict[str, np.ndarray]) -> Any:
        return session.run(None, feed)[0]

    return Engine(
        name="ONNX Runtime",
        dtype="float32",
        run=lambda inputs: torch.from_numpy(np.asarray(call(prepare(inputs)))),
        prepare=prepare,
        run_prepared=call,
    )


def openvino_engine(model: nn.Module, example_inputs: Inputs, *, threads: int, bf16: bool = False) -> Engine:
    """Return OpenVINO on a model, in float32 or with bfloat16 arithmetic."""
    import openvino

    with _quiet():
        converted = openvino.convert_model(model, example_input=_example(example_inputs))
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        },
    )
    request = compiled.create_infer_request()

    def call(feed: list[np.ndarray]) -> Any:
        return request.infer(feed, share_inputs=True)[0]

    return Engine(
        name="OpenVINO",
        dtype="bfloat16" if bf16 else "float32",
        run=lambda inputs: torch.from_numpy(np.array(call(as_arrays(inputs)))),
        prepare=as_arrays,
        run_prepared=call,
    )


def build_engines(
    model: nn.Module, example_inputs: Inputs, names: Sequence[str], *, threads: int
) -> tuple[list[Engine], dict[str, str]]:
    """Return the engines that can run a model, and for each that cannot its reason.

    Args:
        model: In eval mode, on the CPU.
        example_inputs: Any batch.
        names: From `installed`.
        threads: For each of them.
    """
    makers: dict[str, Callable[[], Engine]] = {}
    if "torch" in names:
        makers["torch eager"] = lambda: torch_engine(model)
    if "onnxruntime" in names:
        makers["ONNX Runtime"] = lambda: onnxruntime_engine(model, example_inputs, threads=threads)
    if "openvino" in names:
        makers["OpenVINO"] = lambda: openvino_engine(model, example_inputs, threads=threads)
    if cpu_has_bf16():
        if "torch" in names:
            makers["torch eager bf16"] = lambda: torch_engine(model, dtype=torch.bfloat16)
        if "openvino" in names:
            makers["OpenVINO bf16"] = lambda: openvino_engine(model, example_inputs, threads=threads, bf16=True)
    engines, reasons = [], {}
    for name, make in makers.items():
        try:
            engine = make()
            engine.run(at_batch(example_inputs, 2))
        except Exception as error:  # an engine may refuse an operator in its own way: then it is no rival
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
        else:
            engines.append(engine)
    return engines, reasons


def write_onnx(model: nn.Module, example_inputs: Inputs, path: Path) -> None:
    """Export a model in eval mode to an ONNX file whose batch axis is free."""
    inputs = at_batch(example_inputs, 2)  # a batch of 1 would be taken for a constant
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else None
    args = () if kwargs is not None else inputs if isinstance(inputs, tuple) else (inputs,)
    batch = torch.export.Dim("batch", min=1)
    axes: Any = {0: batch}
    shapes: Any = dict.fromkeys(kwargs, axes) if kwargs is not None else tuple(axes for _ in args)
    with _quiet():
        program = torch.onnx.export(
            model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
        )
        assert program is not None
        program.save(str(path), external_data=False)


def as_arrays(inputs: Inputs) -> list[np.ndarray]:
    """Return a batch's tensors as numpy arrays, in their order."""
    tensors = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    return [tensor.detach().cpu().numpy() for tensor in tensors]


def _example(inputs: Inputs) -> Any:
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from printing their progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
