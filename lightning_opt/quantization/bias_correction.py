"""Bias correction: take back the shift that rounding gives to the mean of a layer's outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs
from lightning_opt.quantization.improvement import Outcome, QuantizedImprovement, Refused
from lightning_opt.quantization.layerwise import Stage, paired_inputs_of, stages
from lightning_opt.quantization.targets import Target, outcome, switched_off, targets_in


def correction(float_weight: Tensor, weight: Tensor, float_mean: Tensor, mean: Tensor) -> Tensor:
    """Return what has to be added to each output so that its mean is what it was, `(G, O)` float64.

    Nagel, van Baalen, Blankevoort, Welling (2019), "Data-Free Quantization Through Weight Equalization and Bias
    Correction", arXiv 1906.04721, equation 17 and appendix D: `E[y] - E[y']`, the means of outputs before the
    activation function. A layer's mean output is its output for the mean input, so that means of inputs are enough.

    Args:
        float_weight: `(G, O, I)` before rounding.
        weight: `(G, O, I)` after it.
        float_mean: Mean of the float model's inputs to the layer, `(G, I)`.
        mean: Mean of the quantized model's.
    """
    before = torch.einsum("goi,gi->go", float_weight.double(), float_mean.double())
    return before - torch.einsum("goi,gi->go", weight.double(), mean.double())


@dataclass(frozen=True, kw_only=True)
class BiasCorrection(QuantizedImprovement):
    """Correct the biases of layer after layer with `correction`, each on what the layers before it give after theirs.

    Nagel et al. (2019), arXiv 1906.04721, appendix D (empirical bias correction). To be applied last: what rewrites
    weights changes means again. Layers without a bias, and without one in the batch norm that follows, are left alone.

    Args:
        exclude: Patterns (`fnmatch`) of full names of layers to leave alone.
    """

    exclude: Sequence[str] = ()

    @torch.no_grad()
    def improve(self, model: nn.Module, batches: Sequence[Inputs], *, reference: nn.Module | None = None) -> Outcome:
        targets, refused = targets_in(model, exclude=self.exclude, by="BiasCorrection", shared=True)
        biased = {path: target for path, target in targets.items() if _bias(target) is not None}
        without = [Refused(path=path, why="it has no bias") for path in targets if path not in biased]
        float_model = switched_off(model) if reference is None else reference
        wanted, _ = targets_in(float_model, by="BiasCorrection", shared=True)
        visited = stages(model, list(biased), batches[0])
        for stage in visited:
            for path, (mean, float_mean) in _means(model, float_model, stage, targets, batches).items():
                target = targets[path]
                _add(target, correction(wanted[path].rows(), target.rounded_rows(), float_mean, mean))
        return outcome(biased, visited, (*refused, *without))


def _means(
    model: nn.Module, reference: nn.Module, stage: Stage, targets: Mapping[str, Target], batches: Sequence[Inputs]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mean rows that each layer of a stage reads in both models, `(G, I)` float64."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for path, x, wanted in paired_inputs_of(model, reference, stage, batches):
        for rows, wanted_rows in targets[path].read_pair(x, wanted):
            part = (rows.double().sum(1), wanted_rows.double().sum(1), rows.shape[1])
            known = sums.get(path)
            sums[path] = part if known is None else (known[0] + part[0], known[1] + part[1], known[2] + part[2])
    return {path: (mean / count, wanted / count) for path, (mean, wanted, count) in sums.items()}


def _bias(target: Target) -> Tensor | None:
    """Return the parameter that shifts a layer's outputs: the batch norm's if that is folded in."""
    norm = target.layer.norm
    return target.layer.bias_or_none if norm is None else norm.bias


def _add(target: Target, shift: Tensor) -> None:
    bias = cast(Tensor, _bias(target))
    bias.copy_(bias.double() + shift.flatten())
