"""Losses between hidden features.

Features come in four layouts: vectors `(B, C)`, tokens `(B, T, D)`, maps `(B, C, H, W)` and, where `kind="conv"` says
so, one-dimensional maps `(B, C, L)`. Each loss sums over the pairs of layers that it is given.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32
from lightning_opt.losses.layers import LayerLoss, exact, flatten
from lightning_opt.losses.projectors import Kind, equal_sizes, make_projector, run_in_own_dtype, width_pair
from lightning_opt.losses.reduce import blank, masked_mean

Distance: TypeAlias = Literal["mse", "cosine", "normalised_mse"]


def _positions(x: Tensor, kind: Kind, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Turn any layout into one vector per position `(B, N, D)`, with the mask if the positions are tokens."""
    x = at_least_float32(x)
    if x.dim() == 2:
        return x[:, None, :], None
    if x.dim() == 4 or kind == "conv":
        return x.flatten(2).transpose(1, 2), None
    return blank(x, token_mask), token_mask


def feature_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    distance: Distance = "mse",
    token_mask: Tensor | None = None,
    kind: Kind = "auto",
) -> Tensor:
    """Average the distance between the features of each position.

    Args:
        student: Any layout of this module, of the teacher's shape.
        teacher: The same shape.
        distance: "mse": mean square (Romero et al. 2015, FitNets, arXiv 1412.6550, equation 3 without its constant;
            Jiao et al. 2020, TinyBERT, arXiv 1909.10351, section 3.1, L_hidn). "cosine": 1 - cos (Sanh et al. 2019,
            DistilBERT, arXiv 1910.01108, section 2, L_cos). "normalised_mse": squared distance of unit vectors (Sun
            et al. 2019, Patient KD, arXiv 1908.09355, L_PT).
        token_mask: Bool `(B, T)`; tokens that are False count for nothing.
        kind: How three axes are read, see `make_projector`.
    """
    ours, mask = _positions(student, kind, token_mask)
    theirs = _positions(teacher, kind, token_mask)[0].to(ours.dtype)
    if distance == "cosine":
        error = 1.0 - functional.cosine_similarity(ours, theirs, dim=-1)
    elif distance == "normalised_mse":
        error = (functional.normalize(ours, dim=-1) - functional.normalize(theirs, dim=-1)).square().sum(dim=-1)
    else:
        error = (ours - theirs).square().mean(dim=-1)
    return masked_mean(error, mask)


class HiddenStates(LayerLoss):
    """Bring the student's hidden features near the teacher's (see `feature_distance`).

    Args:
        layers: Student pattern -> teacher pattern.
        distance: "mse", "cosine" or "normalised_mse".
        kind: How three axes are read, see `make_projector`.
    """

    def __init__(self, layers: Mapping[str, str], *, distance: Distance = "mse", kind: Kind = "auto") -> None:
        super().__init__(layers)
        if distance not in get_args(Distance) or kind not in get_args(Kind):
            raise ValueError(
                f"distance={distance!r} or kind={kind!r}: choose of {get_args(Distance)}, {get_args(Kind)}"
            )
        self.distance, self.kind = distance, kind
        self.projectors = nn.ModuleList()
        self._widths: list[tuple[int, int]] = []

    def build(self, student: Signals, teacher: Signals) -> None:
        """Make a projector for each pair; those whose widths are as at the last call are kept."""
        pairs = self.pairs(student, teacher)
        widths = [width_pair(s, t, self.kind) for s, t in pairs]
        kept = [old == new for old, new in zip(self._widths, widths, strict=False)]
        projectors = [
            self.projectors[i] if kept[i : i + 1] == [True] else make_projector(s, t, kind=self.kind)
            for i, (s, t) in enumerate(pairs)
        ]
        self.projectors, self._widths = nn.ModuleList(projectors), widths

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pairs = [equal_sizes(s, t, kind=self.kind) for s, t in self.pairs(student, teacher)]
        terms = [
            feature_distance(s, t, distance=self.distance, token_mask=supervision.token_mask, kind=self.kind)
            for s, t in self._project(pairs)
        ]
        return torch.stack(terms).sum()

    def _project(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        if not self.projectors and all(ours == theirs for ours, theirs in (width_pair(*p, self.kind) for p in pairs)):
            return pairs
        if len(self.projectors) != len(pairs):
            raise RuntimeError(f"{type(self).__name__} has no projectors yet: call build with one example batch first")
        return [(run_in_own_dtype(project, s), t) for project, (s, t) in zip(self.projectors, pairs, strict=True)]


class FitNets(HiddenStates):
    """Regress the teacher's hint layers from the student's through a projector.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, equation 3, as a mean over all elements.

    Args:
        layers: Student pattern -> teacher pattern.
        kind: How three axes are read, see `make_projector`.
    """

    def __init__(self, layers: Mapping[str, str], *, kind: Kind = "auto") -> None:
        super().__init__(layers, distance="mse", kind=kind)


def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 2.0,
    token_mask: Tensor | None = None,
    kind: Kind = "auto",
) -> Tensor:
    """Compare where two features are strong: unit-length maps of sum_c |x_c|^p, mean square over the positions.

    Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", arXiv 1612.03928, equation 2 with the squared
    norm and mean of its authors' code. Widths may differ.

    Args:
        student: `(B, Cs, H, W)`, or tokens `(B, T, Ds)`.
        teacher: `(B, Ct, H, W)`, or tokens `(B, T, Dt)`.
        power: The exponent p.
        token_mask: Bool `(B, T)`; tokens that are False count for nothing.
        kind: How three axes are read, see `make_projector`.
    """
    ours, mask = _attention(student, power, token_mask, kind)
    theirs, _ = _attention(teacher, power, token_mask, kind)
    return masked_mean((ours - theirs.to(ours.dtype)).square(), mask)


def _attention(x: Tensor, power: float, token_mask: Tensor | None, kind: Kind) -> tuple[Tensor, Tensor | None]:
    vectors, mask = _positions(x, kind, token_mask)
    return functional.normalize(vectors.abs().pow(power).mean(dim=-1), dim=1), mask


class AttentionTransfer(LayerLoss):
    """Keep where the features of a layer are strong (see `attention_transfer`).

    All tokens that leave a layer norm are equally strong: in transformers tap a module before it, such as
    `encoder.layer.1.output.dense`.

    Args:
        layers: Student pattern -> teacher pattern.
        power: The exponent p of the attention map.
        kind: How three axes are read, see `make_projector`.
    """

    def __init__(self, layers: Mapping[str, str], *, power: float = 2.0, kind: Kind = "auto") -> None:
        super().__init__(layers)
        if power <= 0:
            raise ValueError(f"power={power} must be positive")
        self.power, self.kind = power, kind

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pairs = [equal_sizes(s, t, kind=self.kind) for s, t in self.pairs(student, teacher)]
        terms = [
            attention_transfer(s, t, power=self.power, token_mask=supervision.token_mask, kind=self.kind)
            for s, t in pairs
        ]
        return torch.stack(terms).sum()


def similarity_preserving(student: Tensor, teacher: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Compare which samples of a batch excite a layer alike.

    Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682, equations 1-4: row-normalised
    Gram matrices, squared Frobenius norm over B^2.

    Args:
        student: `(B, ...)`.
        teacher: `(B, ...)`; only the number of samples must agree.
        token_mask: Bool `(B, T)`; tokens that are False count for nothing.
    """
    with exact(student):
        ours, theirs = (_similarity(flatten(x, token_mask)) for x in (student, teacher))
    return (ours - theirs.to(ours.dtype)).square().sum() / len(student) ** 2


def _similarity(x: Tensor) -> Tensor:
    return functional.normalize(x @ x.T, dim=1)


class SimilarityPreserving(LayerLoss):
    """Keep which samples of a batch excite a layer alike (see `similarity_preserving`).

    Args:
        layers: Student pattern -> teacher pattern.
    """

    couples_samples = True

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        terms = [
            similarity_preserving(s, t, token_mask=supervision.token_mask) for s, t in self.pairs(student, teacher)
        ]
        return torch.stack(terms).sum()
