"""Four layers of BERT-base's size at half the heads and half the hidden units, and with half the layers."""

import copy
from pathlib import Path
from typing import Any

import torch
from clock import interleaved, judged, load
from torch import nn
from transformers import BertConfig, BertModel

from lightning_opt.export.onnx import OnnxRunner, write_onnx
from lightning_opt.export.openvino import OpenVinoRunner
from lightning_opt.export.program import export_program
from lightning_opt.export.runner import Runner
from lightning_opt.pruning import Structures, choose, keep_layers, trace
from lightning_opt.pruning.layer_times import layers_of
from lightning_opt.pruning.structured import score
from lightning_opt.surgery import replay

X = {
    "input_ids": torch.randint(2000, (1, 128), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(1, 128, dtype=torch.long),
}


class Encoder(nn.Module):
    """The encoder alone, without the pooler, whose one position is no layer's work."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BertConfig(num_hidden_layers=4, vocab_size=2000, attn_implementation="sdpa")
        self.bert = BertModel(self.config, add_pooling_layer=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def networks() -> dict[str, nn.Module]:
    """Return the dense network and the smaller ones, by what was done."""
    torch.manual_seed(0)
    model = Encoder().eval()
    structure = trace(model, X, verify=False)
    groups = Structures(kinds=("heads", "hidden")).of(structure)
    scores = score(structure, groups, model, "l2")
    narrow = copy.deepcopy(model)
    structure.edit(choose(structure, scores, ratio=0.5, round_to=16)).apply(narrow)
    odd = copy.deepcopy(model)
    hidden = {name: values for name, values in scores.items() if structure[name].kind == "hidden"}
    heads = {name: values for name, values in scores.items() if structure[name].kind == "heads"}
    kept = choose(structure, heads, ratio=0.5) | choose(structure, hidden, ratio=0.502)
    structure.edit(kept).apply(odd)
    shallow = copy.deepcopy(model)
    replay(shallow, keep_layers(shallow, [0, 3], path="bert.encoder.layer"))
    return {
        "dense": model,
        "6 of 12 heads, hidden 1536": narrow,
        "6 of 12 heads, hidden 1530": odd,
        "2 of 4 layers": shallow,
    }


def macs(model: nn.Module) -> int:
    """Count the multiply-accumulates of linear layers and attention."""
    linear = sum(layer.flops(*layer.widths) for layer in layers_of(model, X)) / 2
    length = X["input_ids"].shape[1]
    widths = [m.out_features for name, m in model.named_modules() if name.endswith("attention.self.query")]
    return int(linear + sum(2 * length * length * width for width in widths))


def calls(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Return a call without arguments for each engine.

    Raises:
        RuntimeError: ONNX Runtime gives another answer than torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = write_onnx(export_program(model, X), folder / "model.onnx")
    runners: dict[str, Runner] = {
        "ONNX Runtime": OnnxRunner(path, threads=1),
        "OpenVINO": OpenVinoRunner(path, threads=1),
    }
    with torch.no_grad():
        expected = model(**X)
    for engine, runner in runners.items():
        if not torch.allclose(runner.predict(X), expected, rtol=1e-3, atol=1e-3):
            raise RuntimeError(f"{engine} gives another answer than torch")
    return {"torch": lambda: model(**X)} | {engine: runner.bind(X) for engine, runner in runners.items()}


def measure(*, seconds: float, folder: Path) -> dict[str, Any]:
    """Time all networks in each engine, and return times, sizes and efficiencies."""
    built, sizes = networks(), {}
    ready: dict[str, Any] = {}
    for place, (name, model) in enumerate(built.items()):
        sizes[name] = macs(model)
        ready |= {f"{name}|{engine}": call for engine, call in calls(model, folder / str(place)).items()}
    before = load()
    samples = interleaved(ready, seconds=seconds)
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in built.items()}
    found = judged(samples, sizes, limit=0.95)
    return {
        "load": max(before, load()),
        "arms": {name: each | {"params": params[name]} for name, each in found.items()},
    }
