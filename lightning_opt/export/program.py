"""Trace a model once into a program from which every format is written: main output only, free batch size."""

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.inputs import at_batch
from lightning_opt.evaluation.state import evaluation_mode, uncompiled
from lightning_opt.forward import Inputs, predict

OUTPUT_NAME = "logits"
# A batch of one would be taken for a constant, so that the program would run at batch 1 only.
_TRACED_BATCH = 2
_MAX_BATCH = 65_536


def export_program(
    model: nn.Module, example_inputs: Inputs, *, batches: Sequence[Inputs] = (), engines: bool = False
) -> ExportedProgram:
    """Trace `model` in eval mode with `torch.export`, the batch size free.

    The program takes the inputs by their names and returns the main output alone (`lightning_opt.forward.predict`).

    Args:
        model: On the CPU; handed back in the mode it came in.
        example_inputs: Inputs of one or more samples.
        batches: More inputs: an axis whose length differs among them, such as the length of texts, is left free too.
        engines: Show the quantization of a model as single operators, which `write_onnx` and `write_openvino` turn into
            integers. PyTorch alone runs the plain operators otherwise. Without quantization it makes no difference.

    Raises:
        ConfigError: The model cannot be traced, or not with a free batch size.
    """
    inputs = at_batch(example_inputs, _TRACED_BATCH)
    names = input_names(model, inputs)
    shapes = dict(zip(names, _free_axes([inputs, *batches]), strict=True))
    from lightning_opt.quantization.ops import exporting

    try:
        model = _unpacked(model) if engines else model
        with evaluation_mode(model), quiet(), torch.no_grad(), exporting() if engines else nullcontext():
            main = _main_output(model, names, by_name=isinstance(inputs, Mapping)).eval()
            args = () if isinstance(inputs, Mapping) else tensors_of(inputs)
            kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
            return torch.export.export(main, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises dozens of kinds; all mean that the model cannot be traced
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"{type(model).__name__} cannot be exported with a free batch size: {text[:200]}; "
            "check that its forward neither branches on values nor fixes the batch"
        ) from error


def _unpacked(model: nn.Module) -> nn.Module:
    """Return a copy that holds one integer a byte, of any number of bits; the model itself if it holds none."""
    from lightning_opt.quantization.layers.integer import unpack_weights  # that room stands on this one, elsewhere
    from lightning_opt.quantization.state import is_converted

    if not is_converted(model):
        return model
    with uncompiled(model):
        return unpack_weights(copy.deepcopy(model))


def _free_axes(batches: Sequence[Inputs]) -> list[dict[int, Any] | None]:
    """Say for each tensor which axes are free: the first, and those whose length differs among batches.

    Raises:
        ConfigError: The batches do not hold the same tensors.
    """
    shapes = [[tuple(tensor.shape) for tensor in tensors_of(batch)] for batch in batches]
    if len({tuple(map(len, shape)) for shape in shapes}) > 1:
        raise ConfigError("the batches to compare on have other tensors, or tensors of other axes, than the example")
    batch = Dim("batch", min=1, max=_MAX_BATCH)
    free: list[dict[int, Any] | None] = []
    for seen in zip(*shapes, strict=True):
        differing = [axis for axis in range(1, len(seen[0])) if len({shape[axis] for shape in seen}) > 1]
        # The batch must stay free or tracing fails; for other axes PyTorch finds out which of them go together.
        free.append({0: batch, **dict.fromkeys(differing, Dim.DYNAMIC)} if seen[0] else None)
    return free


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Name the inputs: a dict's own names, else those of the parameters of the model's `forward`."""
    if isinstance(inputs, Mapping):
        return list(inputs)
    count = len(tensors_of(inputs))
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    if len(known) >= count:
        return known[:count]
    return ["input"] if count == 1 else [f"input_{place}" for place in range(count)]


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the tensors of a batch's inputs in order."""
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def program_inputs(program: ExportedProgram) -> list[str]:
    """Return the names of a program's inputs in order."""
    return [str(name) for name in program.graph_signature.user_inputs]


def program_shapes(program: ExportedProgram) -> list[list[int]]:
    """Return the shapes of a program's inputs in order; -1 marks a free axis."""
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [[size if type(size) is int else -1 for size in nodes[name].shape] for name in program_inputs(program)]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from printing: their progress lines, warnings and log records are not for our users."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _main_output(model: nn.Module, names: list[str], *, by_name: bool) -> nn.Module:
    """Wrap `model` so that it takes `names` and returns its main output; the tracer reads names from the signature."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        values = dict(zip(names, args, strict=False)) | kwargs
        return predict(self.model, values if by_name else tuple(values[name] for name in names))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper: nn.Module = type("MainOutput", (nn.Module,), {"forward": forward})()
    wrapper.model = model
    return wrapper
