"""How closely a file's answers repeat the model's."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lightning_opt.export.runner import Runner
from lightning_opt.forward import Inputs

_GRID_STEPS = 255


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two runners' answers compared.

    Attributes:
        max_abs_diff: Largest absolute difference.
        largest: Largest absolute answer of the reference.
        argmax_agreement: Share of positions at which both have their largest value, over the last axis, in the same
            place; None when the answers are one value wide.
        steps: `max_abs_diff` in steps of the 8-bit grid that just covers the reference's answers.
    """

    max_abs_diff: float
    largest: float
    argmax_agreement: float | None
    steps: float = 0.0


def compare(reference: Runner, runner: Runner, batches: Iterable[Inputs]) -> Difference:
    """Run both on each batch and compare the answers.

    Raises:
        ValueError: There is no batch, or the answers have different shapes.
    """
    differences, sizes, lows, highs, agreeing, positions = [], [], [], [], 0, 0
    for inputs in batches:
        expected, found = reference.predict(inputs).double(), runner.predict(inputs).double()
        if expected.shape != found.shape:
            raise ValueError(f"answers have the shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
        differences.append((expected - found).abs().max())
        sizes.append(expected.abs().max())
        lows.append(expected.min())
        highs.append(expected.max())
        if expected.dim() > 1 and expected.shape[-1] > 1:
            agree = expected.argmax(-1) == found.argmax(-1)
            agreeing, positions = agreeing + int(agree.sum()), positions + agree.numel()
    if not differences:
        raise ValueError("batches is empty: there is nothing to compare answers on")
    # By torch's max, since Python's loses a NaN that does not come first.
    difference = float(torch.stack(differences).max())
    step = float(torch.stack(highs).max() - torch.stack(lows).min()) / _GRID_STEPS
    return Difference(
        max_abs_diff=difference,
        largest=float(torch.stack(sizes).max()),
        argmax_agreement=agreeing / positions if positions else None,
        steps=difference / step if difference and step else float(difference > 0),
    )
