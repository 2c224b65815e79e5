"""Zeros without a smaller shape: dense kernels do not skip them, and what torch's sparse kernels make of them."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bert
import torch
from clock import interleaved, judged, load, summary
from torch import Tensor, nn

from lightning_opt.evaluation.engines import cpu_has_bfloat16
from lightning_opt.export.onnx import OnnxRunner
from lightning_opt.export.openvino import OpenVinoRunner
from lightning_opt.pruning.engine_times import onnx_layer

SPARSITIES = (0.9, 0.95)
ROWS, INPUTS, OUTPUTS = 128, 768, 3072


def zeroed(model: nn.Module, share: float) -> nn.Module:
    """Set the given share of each weight matrix and kernel to zero, in place: the smallest values."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                limit = parameter.abs().flatten().kthvalue(round(share * parameter.numel())).values
                parameter.mul_(parameter.abs() > limit)
    return model


def linear_calls(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return one linear layer in float32, in bfloat16 and as CSR with two shares of zeros, on 128 rows."""
    torch.manual_seed(0)
    layer, x = nn.Linear(INPUTS, OUTPUTS).eval(), torch.randn(ROWS, INPUTS)
    path = folder / "layer.onnx"
    path.write_bytes(onnx_layer(layer, x))
    half, x_half = nn.Linear(INPUTS, OUTPUTS).bfloat16().eval(), x.bfloat16()
    found: dict[str, Callable[[], Any]] = {
        "dense fp32, torch": lambda: layer(x).relu(),
        "dense fp32, ONNX Runtime": OnnxRunner(path, threads=1).bind(x),
        "dense fp32, OpenVINO": OpenVinoRunner(path, threads=1).bind(x),
        "dense bf16, torch": lambda: half(x_half).relu(),
    }
    x_turned, bias = x.t().contiguous(), layer.bias.detach()[:, None]
    for share in SPARSITIES:
        sparse = zeroed(nn.Linear(INPUTS, OUTPUTS), share).get_parameter("weight").detach().to_sparse_csr()
        found[f"CSR {share:.0%} zeros, torch"] = partial(_sparse, sparse, x_turned, bias)
    return found


def _sparse(weight: Tensor, x_turned: Tensor, bias: Tensor) -> Tensor:
    return (weight @ x_turned + bias).relu()


def measure(*, seconds: float, folder: Path) -> dict[str, Any]:
    """Time a network with zeros beside the dense one in each engine, and a sparse linear layer beside dense ones."""
    dense = bert.Encoder().eval()
    networks = {"dense": dense, "90% zeros": zeroed(copy.deepcopy(dense), 0.9)}
    ready: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    for place, (name, model) in enumerate(networks.items()):
        sizes[name] = bert.macs(model)
        ready |= {f"{name}|{engine}": call for engine, call in bert.calls(model, folder / str(place)).items()}
    before = load()
    samples = interleaved(ready, seconds=0.7 * seconds)
    layers = interleaved(linear_calls(folder), seconds=0.3 * seconds)
    return {
        "load": max(before, load()),
        "arms": judged(samples, sizes, limit=None),
        "linear": summary(layers),
        "bfloat16_in_hardware": cpu_has_bfloat16(),
    }
