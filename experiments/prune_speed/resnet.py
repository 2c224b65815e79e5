"""A ResNet-50 cut to 1/2, 1/4 and 1/14 of its multiply-accumulates in several ways."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from clock import Samples, interleaved, judged, load
from onnx_files import Template, calls
from torch import Tensor, nn

from lightning_opt.models import ResNet
from lightning_opt.pruning import Structure, Structures, choose, keep_layers, trace
from lightning_opt.pruning.engine_times import time_in_onnxruntime, time_in_openvino
from lightning_opt.pruning.latency import LatencyAware, MeasuredTimes, layers_of
from lightning_opt.pruning.structured import score
from lightning_opt.surgery import replay

TARGETS = (2, 4, 14)
LIMITS = {2: 0.95, 4: 0.85, 14: 0.75}
X = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
# Blocks that stay where depth goes too: the first of each stage changes its shape and must stay.
SHALLOW = {"layer1": [0, 2], "layer2": [0, 3], "layer3": [0, 2, 5], "layer4": [0, 2]}

SHARES = {("torch NCHW", "torch channels-last"): 0.35, ("ONNX Runtime", "OpenVINO"): 0.65}

Arms = dict[str, nn.Module]
Peer = Callable[..., nn.Module]


def network() -> nn.Module:
    """Make the dense network; channels differ in scale, as trained ones do, so that there is something to choose."""
    torch.manual_seed(0)
    model = ResNet(num_outputs=1000, depth=50).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.exp(0.3 * torch.randn(module.out_channels, 1, 1, 1)))
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(std=0.1)
    return model


def macs(model: nn.Module) -> int:
    """Count the multiply-accumulates of all convolutions and linear layers, as they run."""
    return int(sum(layer.flops(*layer.widths) for layer in layers_of(model, X)) / 2)


class Cutter:
    """One network, traced once, and cut again and again."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.layers = model, layers_of(model, X)
        self.structure: Structure = trace(model, X, verify=False)
        groups = Structures(round_to=1).of(self.structure)
        self.scores = score(self.structure, groups, model, "l2")
        self.macs = macs(model)

    def cut(self, kept: Mapping[str, list[int]]) -> nn.Module:
        small = copy.deepcopy(self.model)
        self.structure.edit(kept).apply(small)
        return small

    def uniform(self, ratio: float, *, round_to: int) -> nn.Module:
        return self.cut(choose(self.structure, self.scores, ratio=ratio, of="flops", round_to=round_to, min_keep=1))

    def everywhere(self, ratio: float, *, round_to: int) -> nn.Module:
        relative: dict[str, Tensor] = {name: each / each.mean() for name, each in self.scores.items()}
        options: dict[str, Any] = {"of": "flops", "round_to": round_to, "min_keep": 1, "allocation": "global"}
        return self.cut(choose(self.structure, relative, ratio=ratio, **options))

    def by_time(self, ratio: float, times: MeasuredTimes, *, round_to: int) -> nn.Module:
        how = LatencyAware(self.layers, times, of="flops")
        return self.cut(choose(self.structure, self.scores, ratio=ratio, round_to=round_to, allocation=how))


def few_arms(dense: Cutter, times: Mapping[str, MeasuredTimes], peer: Peer | None, target: int) -> Arms:
    """Return what matters most, for a look."""
    ratio, measured = 1.0 - 1.0 / target, times["ONNX Runtime"]
    found = {f"uniform, round_to {step}": dense.uniform(ratio, round_to=step) for step in (1, 8)}
    found["latency-aware (ONNX Runtime), round_to 8"] = dense.by_time(ratio, measured, round_to=8)
    if peer is not None:
        found["Torch-Pruning, as it comes"] = peer(dense.model, target=target, round_to=None, tries=4)
    return found


def arms(dense: Cutter, shallow: Cutter, times: Mapping[str, MeasuredTimes], peer: Peer | None, target: int) -> Arms:
    """Return the networks of one target by what was done."""
    ratio = 1.0 - 1.0 / target
    found = {f"uniform, round_to {step}": dense.uniform(ratio, round_to=step) for step in (1, 8, 16, 32)}
    found["global, round_to 8"] = dense.everywhere(ratio, round_to=8)
    for engine, measured in times.items():
        found[f"latency-aware ({engine}), round_to 8"] = dense.by_time(ratio, measured, round_to=8)
    ours = times["ONNX Runtime"]
    found["latency-aware (ONNX Runtime), round_to 16"] = dense.by_time(ratio, ours, round_to=16)
    if target == 14:
        left = 1.0 - dense.macs / target / shallow.macs
        found["9 of 16 blocks, then latency-aware, round_to 8"] = shallow.by_time(left, ours, round_to=8)
    if peer is not None:
        found["Torch-Pruning, as it comes"] = peer(dense.model, target=target, round_to=None)
        found["Torch-Pruning, round_to 16"] = peer(dense.model, target=target, round_to=16)
    return found


def measure(*, seconds: float, folder: Path, peer: Peer | None, quick: bool) -> dict[str, Any]:
    """Build all networks, time them beside the dense one in each engine, and return times, sizes and efficiencies."""
    model = network()
    dense = Cutter(model)
    shallow = dense if quick else Cutter(without_blocks(model))
    templates = {blocks(cutter.model): Template(cutter.model, X, folder) for cutter in {dense, shallow}}
    times = {
        "ONNX Runtime": MeasuredTimes(time_in_onnxruntime, step=8),
        "OpenVINO": MeasuredTimes(time_in_openvino, step=8),
    }
    templates[16].write(model, "dense")
    found: dict[str, Any] = {}
    for target in (2, 14) if quick else TARGETS:
        made = few_arms(dense, times, peer, target) if quick else arms(dense, shallow, times, peer, target)
        networks = {"dense": model, **made}
        ready: dict[tuple[str, str], Any] = {}
        for place, (name, small) in enumerate(networks.items()):
            path = templates[blocks(small)].write(small, f"{target}_{place}")
            ready |= {(name, engine): call for engine, call in calls(small, X, path).items()}
        before = load()
        samples: Samples = {}
        for engines, part in SHARES.items():  # the fast engines decide, so that they get more rounds
            chosen = {f"{name}|{engine}": call for (name, engine), call in ready.items() if engine in engines}
            samples |= interleaved(chosen, seconds=part * seconds / 3)
        sizes = {name: macs(small) for name, small in networks.items()}
        found[str(target)] = {"load": max(before, load()), "arms": judged(samples, sizes, limit=LIMITS[target])}
        print(f"1/{target}: {len(samples['dense|ONNX Runtime'])} rounds", flush=True)
    return found


def without_blocks(model: nn.Module) -> nn.Module:
    small = copy.deepcopy(model)
    for path, kept in SHALLOW.items():
        replay(small, keep_layers(small, kept, path=path))
    return small


def blocks(model: nn.Module) -> int:
    return sum(len(list(model.get_submodule(path).children())) for path in SHALLOW)
