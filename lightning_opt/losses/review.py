"""Layers that review each other before they are compared (ReviewKD)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.errors import ConfigError
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32
from lightning_opt.losses.layers import LayerLoss
from lightning_opt.losses.projectors import run_in_own_dtype


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare two maps `(B, C, H, W)` at full size and pooled to 4, 2 and 1, each level with half the weight.

    Chen et al. 2021, "Distilling Knowledge via Knowledge Review", arXiv 2104.09044, section 3.3 (HCL).
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    levels = [size for size in (4, 2, 1) if size < min(student.shape[2:])]
    terms = [functional.mse_loss(student, teacher)]
    terms += [
        functional.mse_loss(functional.adaptive_avg_pool2d(student, n), functional.adaptive_avg_pool2d(teacher, n))
        for n in levels
    ]
    weights = [0.5**level for level in range(len(terms))]
    return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """Fuse a layer with what deeper layers said, by attention (Chen et al. 2021, arXiv 2104.09044, section 3.3, ABF).

    Args:
        width: Channels of the student's layer.
        inner: Channels of the fused map that goes on to the next layer.
        out: Channels of the teacher's layer.
        fuse: False for the deepest layer, which has nothing to be fused with.
    """

    def __init__(self, width: int, *, inner: int, out: int, fuse: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.leave = nn.Sequential(nn.Conv2d(inner, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.attend = nn.Sequential(nn.Conv2d(2 * inner, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the map to compare with a teacher of this `size` and the map for the next, shallower layer."""
        x = run_in_own_dtype(self.enter, x)
        if self.attend is not None and deeper is not None:
            deeper = functional.interpolate(deeper, size=x.shape[2:], mode="nearest")
            ours, theirs = self.attend(torch.cat([x, deeper], dim=1)).split(1, dim=1)
            x = x * ours + deeper * theirs
        wanted = x if x.shape[2:] == size else functional.interpolate(x, size=size, mode="nearest")
        return self.leave(wanted), x


class ReviewKD(LayerLoss):
    """Let the student's deep and shallow layers together review the teacher's shallow ones.

    Chen et al. 2021, "Distilling Knowledge via Knowledge Review", arXiv 2104.09044, section 3, with `Fusion` and
    `hierarchical_context`.

    Args:
        layers: Student pattern -> teacher pattern, from shallow to deep; maps `(B, C, H, W)` or vectors `(B, C)`.
        inner_channels: Width of the fused maps. None: as the student's deepest layer, at most 512.
    """

    averages_over = "samples"

    def __init__(self, layers: Mapping[str, str], *, inner_channels: int | None = None) -> None:
        super().__init__(layers)
        self.inner_channels = inner_channels
        self.fusions = nn.ModuleList()
        self._widths: list[tuple[int, int]] = []

    def build(self, student: Signals, teacher: Signals) -> None:
        """Make one fusion a layer, unless the widths are as at the last call."""
        pairs = self._maps(student, teacher)
        widths = [(s.shape[1], t.shape[1]) for s, t in pairs]
        if widths == self._widths:
            return
        inner, last = self.inner_channels or min(512, widths[-1][0]), len(pairs) - 1
        fusions = [Fusion(ours, inner=inner, out=out, fuse=i < last) for i, (ours, out) in enumerate(widths)]
        self.fusions, self._widths = nn.ModuleList(fusions).to(pairs[0][0].device), widths

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        if not self.fusions:
            raise RuntimeError(
                "ReviewKD has no fusion modules yet: call build(student, teacher) with one example batch"
            )
        deeper, terms = None, []
        pairs = zip(self.fusions, self._maps(student, teacher), strict=True)
        for fuse, (ours, theirs) in reversed(list(pairs)):
            reviewed, deeper = fuse(ours, deeper, theirs.shape[2:])
            terms.append(hierarchical_context(reviewed, theirs))
        return torch.stack(terms).sum()

    def _maps(self, student: Signals, teacher: Signals) -> list[tuple[Tensor, Tensor]]:
        maps = [tuple(x[..., None, None] if x.dim() == 2 else x for x in pair) for pair in self.pairs(student, teacher)]
        for ours, theirs in maps:
            if ours.dim() != 4 or theirs.dim() != 4:
                shapes = f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
                raise ConfigError(f"layers: ReviewKD compares maps (B, C, H, W) or vectors (B, C), not {shapes}")
        return [(ours, theirs) for ours, theirs in maps]
