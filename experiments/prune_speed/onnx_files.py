"""One ONNX file of the dense network, and copies of it with a smaller network's weights put in.

Exporting a network of this size takes seconds, and two dozen are timed. The graph is the same for all of them, so only
the weights are put in the place of the dense ones; the answers are compared with torch's.
"""

import copy
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_opt.export.onnx import OnnxRunner, write_onnx
from lightning_opt.export.openvino import OpenVinoRunner
from lightning_opt.export.program import export_program


class Template:
    """The graph of a network whose layers are convolutions, with batch norms folded in, and linear layers.

    Args:
        model: In eval mode.
        x: An input.
        folder: Where the files go.
    """

    def __init__(self, model: nn.Module, x: Tensor, folder: Path) -> None:
        path = write_onnx(export_program(folded(model), x), folder / "template.onnx")
        self.proto, self.folder, self.x = onnx.load(path), folder, x
        for node in self.proto.graph.node:
            del node.metadata_props[:]
        del self.proto.graph.value_info[:]

    def write(self, model: nn.Module, name: str) -> Path:
        """Write the file of a network with the same layers of other widths.

        Raises:
            RuntimeError: ONNX Runtime gives another answer than torch.
        """
        proto, plain = copy.deepcopy(self.proto), folded(model)
        left = {key: value.detach() for key, value in plain.named_parameters()}
        for at, held in enumerate(proto.graph.initializer):
            key = held.name.removeprefix("model.")
            if key in left:
                proto.graph.initializer[at].CopyFrom(numpy_helper.from_array(left.pop(key).numpy(), held.name))
            elif numpy_helper.to_array(held).tolist()[-1:] == [2048]:  # what is flattened before the head
                width = plain.get_submodule("fc").in_features
                shape = numpy_helper.to_array(held).copy()
                shape[-1] = width
                proto.graph.initializer[at].CopyFrom(numpy_helper.from_array(shape, held.name))
        if left:
            raise RuntimeError(f"the graph has no place for {', '.join(left)}")
        path = self.folder / f"{name}.onnx"
        onnx.save(proto, path)
        check(path, model, self.x)
        return path


def check(path: Path, model: nn.Module, x: Tensor) -> None:
    answer = OnnxRunner(path, threads=1).predict(x)
    with torch.no_grad():
        expected = model(x)
    if not torch.allclose(answer, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise RuntimeError(f"{path.name} gives another answer: {float((answer - expected).abs().max()):.2g}")


def folded(model: nn.Module) -> nn.Module:
    """Return a copy whose batch norms are in the convolutions before them."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        before = None
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.BatchNorm2d) and isinstance(before, tuple):
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(before[1], module)
                setattr(parent, before[0], fused)
                setattr(parent, name, nn.Identity())
            before = (name, module) if isinstance(module, nn.Conv2d) else None
    return model


def calls(model: nn.Module, x: Tensor, path: Path) -> dict[str, Any]:
    """Return a call without arguments for each engine."""
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last)
    return {
        "torch NCHW": lambda: model(x),
        "torch channels-last": lambda: last(x_last),
        "ONNX Runtime": OnnxRunner(path, threads=1).bind(x),
        "OpenVINO": OpenVinoRunner(path, threads=1).bind(x),
    }
