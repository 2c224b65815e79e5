"""Turn a program with quantization operators into an ONNX model that engines run in integers."""

from typing import Any

import torch
from torch.export import ExportedProgram

from lightning_opt.export import quantized_graph as rewrite
from lightning_opt.export.program import OUTPUT_NAME, program_inputs, quiet
from lightning_opt.export.quantized_ops import OPSET, holds_quantization, translation_table
from lightning_opt.export.quantized_weights import place_weights


def onnx_of(program: ExportedProgram, *, dynamic: bool = True) -> Any:
    """Translate a program; inputs keep their names, the output is called "logits".

    Args:
        program: From `export_program`.
        dynamic: Keep the quantization of values whose range is found as they come. Without it their layers read plain
            values, for engines that quantize such values in ways of their own.

    Returns:
        A `torch.onnx.ONNXProgram`.
    """
    is_quantized = holds_quantization(program)
    extra: dict[str, Any] = (
        {"custom_translation_table": translation_table(), "opset_version": OPSET} if is_quantized else {}
    )
    with quiet():
        made: Any = torch.onnx.export(
            program,
            (),
            input_names=program_inputs(program),
            output_names=[OUTPUT_NAME],
            dynamo=True,
            verbose=False,
            **extra,
        )
        if is_quantized:
            simplify(made.model, dynamic=dynamic)
        _forget_origin(made.model)
    return made


def simplify(model: Any, *, dynamic: bool = True) -> None:
    """Bring the quantized layers of an ONNX model (`onnx_ir.Model`) to the forms that engines run in integers."""
    graph = model.graph
    rewrite.fold_constants(graph)
    rewrite.merge_tied(graph)
    if not dynamic:
        rewrite.drop_dynamic(graph)
    rewrite.merge_repeated(graph)
    rewrite.skip_second_rounding(graph)
    rewrite.remove_unused(model)
    rewrite.join_integers(graph)
    rewrite.move_integers(graph)
    rewrite.pool_integers(graph)
    place_weights(graph)
    rewrite.remove_unused(model)  # what was rewritten must not be taken for equal to what it became
    rewrite.integer_biases(graph)
    rewrite.part_functions(graph)
    rewrite.drop_zero_points(graph)
    rewrite.merge_repeated(graph)
    rewrite.remove_unused(model)


def _forget_origin(model: Any) -> None:
    """Remove the tracer's notes, which are longer than small models and name files of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
