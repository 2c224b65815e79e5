"""Second process: build the model anew, replay the recipe, load the weights, and compare with what was expected."""

import json
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from cut import RATIOS, answers, flat
from each import run_each
from safetensors.torch import load_file

from lightning_opt.export import read_safetensors
from lightning_opt.forward import Inputs
from lightning_opt.surgery import Recipe, replay


def rebuilt(name: str, folder: Path, tag: str) -> torch.nn.Module:
    """Build the model with other random weights and bring it to the form that the recipe says."""
    torch.manual_seed(99)
    recipe = Recipe.from_json((folder / f"recipe-{tag}.json").read_text())
    model = replay(ARCHITECTURES[name].build(), recipe)
    return read_safetensors(model, folder / f"weights-{tag}.safetensors").eval()


def read_inputs(folder: Path) -> Inputs:
    tensors = load_file(folder / "inputs.safetensors")
    positional = tuple(tensors[name] for name in sorted(tensors) if name.startswith("positional."))
    return positional or tensors


def main(name: str, folder: Path) -> None:
    inputs, expected = read_inputs(folder), load_file(folder / "expected.safetensors")
    found: dict[str, Any] = {}
    for ratio in map(str, RATIOS):
        answer = flat(answers(rebuilt(name, folder, ratio), inputs))
        largest = float(expected[ratio].abs().max())
        found[ratio] = {
            "difference": float((answer - expected[ratio]).abs().max()),
            "largest": largest,
            "moved": float((answer - expected["dense"]).abs().max()),
        }
    runs = flat(answers(rebuilt(name, folder, "all"), inputs))
    found["all_kinds_run"] = bool(runs.isfinite().all()) and len(runs) == len(expected["dense"])
    (folder / "replay.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_each(main, seconds=lambda _: 60)
