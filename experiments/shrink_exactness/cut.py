"""First process: trace a model, cut random units, and write recipe, smaller weights and the answers expected."""

import copy
import json
import time
from collections import Counter
from pathlib import Path

import torch
from architectures import ARCHITECTURES, randomise
from each import run_each
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.export import write_safetensors
from lightning_opt.forward import Inputs, forward, map_inputs
from lightning_opt.pruning.structure import Structure, trace
from lightning_opt.pruning.structure.program import tensors_of
from lightning_opt.surgery import Recipe

RATIOS = (0.25, 0.5, 0.75)


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [tensor for tensor in tensors_of(forward(model.eval(), inputs)) if tensor.is_floating_point()]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def chosen(structure: Structure, ratio: float, *, all_kinds: bool, seed: int = 7) -> dict[str, list[int]]:
    """Keep random units of each group, at least one."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in structure.groups:
        order = torch.randperm(group.size, generator=generator).tolist()
        if group.exact or all_kinds:
            kept[group.name] = order[: max(1, round(group.size * (1 - ratio)))]
    return kept


def write(folder: Path, tag: str, model: nn.Module, structure: Structure, kept: dict[str, list[int]]) -> int:
    """Cut a copy of the model and write its recipe and weights; return its number of parameters."""
    edit = structure.edit(kept)
    small = edit.apply(copy.deepcopy(model))
    (folder / f"recipe-{tag}.json").write_text(Recipe([edit]).to_json())
    write_safetensors(small, folder / f"weights-{tag}.safetensors")
    return sum(parameter.numel() for parameter in small.parameters())


def main(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build().eval(), architecture.inputs()
    randomise(model, seed=1)
    save_file(_named(inputs), folder / "inputs.safetensors")
    started = time.process_time()
    try:
        structure = trace(model, inputs)
    except ConfigError as error:
        (folder / "cut.json").write_text(json.dumps({"refused": str(error)}))
        return
    facts = describe(structure) | {"trace_s": round(time.process_time() - started, 2), "params": structure.parameters()}
    facts |= {"flops": structure.flops(), "ratios": {}}
    expected = {"dense": flat(answers(model, inputs))}
    for ratio in RATIOS:
        kept = chosen(structure, ratio, all_kinds=False)
        count = write(folder, str(ratio), model, structure, kept)
        facts["ratios"][str(ratio)] = {"params": count, "flops": structure.flops(kept)}
        expected[str(ratio)] = flat(answers(masked(model, structure.masks(kept)), inputs))
    write(folder, "all", model, structure, chosen(structure, 0.5, all_kinds=True))
    save_file(expected, folder / "expected.safetensors")
    (folder / "cut.json").write_text(json.dumps(facts))


def describe(structure: Structure) -> dict[str, object]:
    exact = Counter(group.kind for group in structure.groups if group.exact)
    inexact = Counter(group.kind for group in structure.groups if not group.exact)
    usual = ("is an axis of", "holds rows")
    refused = sorted(
        {
            f"{refusal.tensor.rpartition('.')[0]}: {refusal.why} {refusal.operation}".strip()
            for refusal in structure.refused
            if not refusal.why.startswith(usual)
        }
    )
    return {"exact": dict(exact), "inexact": dict(inexact), "refused_axes": refused}


def _named(inputs: Inputs) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if isinstance(inputs, dict):
        return {name: tensor.contiguous() for name, tensor in inputs.items()}
    map_inputs(inputs, lambda tensor: found.setdefault(f"positional.{len(found)}", tensor.contiguous()))
    return found


if __name__ == "__main__":
    run_each(main, seconds=lambda _: 120)
