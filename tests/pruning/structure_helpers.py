"""The check that the tests of the structure share: zeroing units of the dense model and cutting them is the same."""

import copy

import torch
from torch import nn

from lightning_opt.forward import Inputs, forward, logits_of
from lightning_opt.pruning.structure import Structure, trace


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give weights, norms and running statistics values that nothing is silent under."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                noise / (parameter.numel() / len(parameter)) ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * noise
            )
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def random_units(
    structure: Structure, *, share: float = 0.5, seed: int = 0, kinds: tuple[str, ...] = ()
) -> dict[str, list[int]]:
    """Choose units to keep, by chance and in no order, of the exact groups (of some kinds)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [group for group in structure.groups if (group.kind in kinds if kinds else group.exact)]
    return {
        group.name: torch.randperm(group.size, generator=generator)[: max(1, round(share * group.size))].tolist()
        for group in chosen
    }


def answer(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(forward(model.eval(), inputs))


def zeroed(model: nn.Module, masks: dict[str, torch.Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def check_exact(
    model: nn.Module, inputs: Inputs, *, share: float = 0.5, kinds: tuple[str, ...] = (), verify: bool = False
) -> Structure:
    """Assert that cutting random units is the same as zeroing them, that it matters, and that the model got smaller."""
    enliven(model)
    structure = trace(model, inputs, verify=verify)
    kept = random_units(structure, share=share, kinds=kinds)
    assert kept, "nothing to cut"
    dense, masked = answer(model, inputs), answer(zeroed(model, structure.masks(kept)), inputs)
    small = structure.edit(kept).apply(copy.deepcopy(model))
    cut = answer(small, inputs)
    assert (cut - masked).abs().max() <= 1e-5 * max(1, float(masked.abs().max()))
    assert (masked - dense).abs().max() > 1e-3 * float(dense.abs().max())
    count = sum(parameter.numel() for parameter in small.parameters())
    assert count == structure.parameters(kept) < structure.parameters()
    return structure
