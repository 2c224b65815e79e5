"""The same models through Torch-Pruning: random units, the same ratios, the same comparison with the zeroed model.

It is given what it cannot find out: which linear layers are heads and how many there are, and which layers make a width
under a norm (left alone, since zeroing and cutting differ there). Attributes that its users must set by hand are set.
The entries that it kept are recognised by their values, which are all different in float64, so that the zeroed model
needs none of its own bookkeeping.
"""

import contextlib
import copy
import io
import json
import time
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, PLAIN, randomise
from cut import RATIOS, answers, flat
from each import run_each
from torch import nn

from lightning_opt.forward import Inputs, map_inputs
from lightning_opt.pruning.structure import Structure, trace

_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads", "n_head")
_WIDTHS = ("all_head_size", "embed_dim", "split_size", "inner_dim", "width")


def head_layers(model: nn.Module, structure: Structure) -> dict[nn.Module, int]:
    """Return the linear layers whose outputs are heads, with their number of heads."""
    found: dict[nn.Module, int] = {}
    queries = {
        member.tensor: group.size for group in structure.groups if group.kind == "queries" for member in group.members
    }
    for group in structure.groups:
        for member in group.members if group.kind == "heads" else ():
            layer = model.get_submodule(member.tensor.rpartition(".")[0])
            if isinstance(layer, nn.Linear) and member.tensor.endswith("weight") and member.dim == 0:
                found[layer] = group.size * queries.get(member.tensor, 1)
    return found


def left_alone(model: nn.Module, structure: Structure) -> list[nn.Module]:
    """Return the layers that make the model's outputs or an axis under a norm, tied ones too."""
    under_norm = [group for group in structure.groups if group.kind in ("width", "embedding")]
    names = {member.tensor for group in under_norm for member in group.members if member.dim == 0}
    names |= {member.tensor for group in under_norm for member in group.members if "embed" in member.tensor}
    names |= {r.tensor for r in structure.refused if r.dim == 0 and ("output" in r.why or "rows" in r.why)}
    held = {id(model.get_parameter(name)) for name in names if name in dict(model.named_parameters())}
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    return [layer for layer in model.modules() if isinstance(layer, kinds) and id(layer.weight) in held]


def set_by_hand(before: nn.Module, after: nn.Module, heads: dict[nn.Module, int], left: dict[nn.Module, int]) -> None:
    """Set the numbers of attention modules as the documentation of Torch-Pruning asks of its users."""
    sizes = {name: layer for name, layer in after.named_modules() if layer in heads}
    for name, layer in sizes.items():
        path = name.rpartition(".")[0]
        owner, old = after.get_submodule(path), before.get_submodule(name)
        for attribute, value in list(vars(owner).items()):
            if attribute in _HEADS and value == heads[layer]:
                setattr(owner, attribute, left[layer])
            elif attribute in _WIDTHS and value == old.out_features:
                setattr(owner, attribute, layer.out_features)


def cut(model: nn.Module, inputs: Inputs, structure: Structure, ratio: float) -> tuple[nn.Module, int]:
    import torch_pruning

    heads = head_layers(model, structure)
    torch.manual_seed(3)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=ratio,
        num_heads=dict(heads),
        prune_num_heads=bool(heads),
        prune_head_dims=False,
        head_pruning_ratio=ratio,
        ignored_layers=left_alone(model, structure),
        output_transform=lambda answer: answers_of(answer)[0],
    )
    before, counts = copy.deepcopy(model), 0
    for group in pruner.step(interactive=True):
        group.prune()
        counts += 1
    set_by_hand(before, model, heads, pruner.num_heads)
    return model, counts


def answers_of(answer: Any) -> list[torch.Tensor]:
    from lightning_opt.pruning.structure.program import tensors_of

    return [tensor for tensor in tensors_of(answer) if tensor.is_floating_point()]


def zeroed_like(model: nn.Module, small: nn.Module) -> nn.Module:
    """Zero the entries of `model` that are not left in `small`, told by their values."""
    left = dict(small.named_parameters())
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if left[name].shape != parameter.shape:
                parameter.mul_(torch.isin(parameter, left[name]))
    return model


def compare(name: str, ratio: float) -> dict[str, Any]:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build().eval(), architecture.inputs()
    randomise(model, seed=1)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():  # drawn in float32, some values come twice
            parameter.add_(torch.rand_like(parameter) * 1e-6)
    inputs = map_inputs(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    structure = trace(model, inputs, verify=False)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a cache's concatenations keep its graph from being built
    started = time.process_time()
    small, groups = cut(copy.deepcopy(model), inputs, structure, ratio)
    seconds = time.process_time() - started
    params = sum(parameter.numel() for parameter in small.parameters())
    found = {"groups": groups, "params": params, "seconds": round(seconds, 2)}
    if not groups:
        return found | {"verdict": "fail", "why": "prunes nothing, without saying so"}
    answer = flat(answers(small, inputs))
    expected = flat(answers(zeroed_like(model, small), inputs))
    difference, largest = float((answer - expected).abs().max()), float(expected.abs().max())
    passes = difference <= 1e-5 * max(1.0, largest)
    return found | {
        "difference": difference,
        "verdict": "pass" if passes else "fail",
        "why": "" if passes else "another answer than the zeroed model",
    }


def main(name: str, folder: Path) -> None:
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found[str(ratio)] = compare(name, ratio)
        except Exception as error:  # whatever it raises is the result
            first = (str(error).splitlines() or [""])[0][:160]
            found[str(ratio)] = {"verdict": "fail", "why": f"{type(error).__name__}: {first}"}
    (folder / "peer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_each(main, seconds=lambda name: 90 if name in PLAIN else 30)
