"""Losses on the relations between samples or tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightning_opt.errors import ConfigError
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32, kl
from lightning_opt.losses.layers import LayerLoss, exact, flatten
from lightning_opt.losses.reduce import blank, mean_per_sample


def rkd_distance(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Compare the distances between samples, each relative to the network's mean distance.

    Park et al. 2019, "Relational Knowledge Distillation", arXiv 1904.05068, section 3.2.1: the Huber loss between
    psi(i, j) = |x_i - x_j| / mu of both networks, mu the mean over all pairs, averaged over B x B.

    Args:
        student: `(B, Ds)`.
        teacher: `(B, Dt)`; the widths may differ.
        valid: Bool `(B,)`; samples that are False count for nothing.
    """
    weight = _rows(student, valid)
    pair_weight = weight[:, None] * weight[None, :]
    error = functional.smooth_l1_loss(
        _relative_distances(student, pair_weight), _relative_distances(teacher, pair_weight), reduction="none"
    )
    return (error * pair_weight).sum() / pair_weight.sum().clamp(min=1.0)


def rkd_angle(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Compare the angles that each three samples form.

    Park et al. 2019, arXiv 1904.05068, section 3.2.2: the Huber loss between the cosines of the angles at x_j between
    x_i and x_k, averaged over B x B x B. Arguments as for `rkd_distance`. Memory grows with B^2 D + B^3: give it
    pooled features.
    """
    weight = _rows(student, valid)
    with exact(student):
        error = functional.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none")
    if valid is None:
        return error.mean()
    triplet_weight = weight[:, None, None] * weight[None, :, None] * weight[None, None, :]
    return (error * triplet_weight).sum() / triplet_weight.sum().clamp(min=1.0)


def _rows(x: Tensor, valid: Tensor | None) -> Tensor:
    return x.new_ones(len(x)) if valid is None else valid.to(x.dtype)


def _relative_distances(x: Tensor, pair_weight: Tensor) -> Tensor:
    # The shortcut through a matrix product loses half of the digits for near samples
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = (distance * pair_weight).sum() / (pair_weight * (distance > 0)).sum().clamp(min=1.0)
    return distance / mean.clamp(min=torch.finfo(x.dtype).tiny)


def _angles(x: Tensor) -> Tensor:
    edge = functional.normalize(x[None, :, :] - x[:, None, :], dim=2)
    return edge @ edge.transpose(1, 2)


class RKDDistance(LayerLoss):
    """Keep the distances between the samples of a batch (see `rkd_distance`), on logits or on tapped features.

    Args:
        layers: Student pattern -> teacher pattern; the sum over the pairs is returned. None: the logits.
    """

    couples_samples = True

    def __init__(self, layers: Mapping[str, str] | None = None) -> None:
        super().__init__(layers)

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        mask = self.mask(supervision)
        pairs = self.pairs(student, teacher)
        return torch.stack([self._compare(flatten(s, mask), flatten(t, mask), _valid(mask)) for s, t in pairs]).sum()

    def _compare(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        return rkd_distance(student, teacher.to(student.dtype), valid=valid)


class RKDAngle(RKDDistance):
    """Keep the angles between each three samples of a batch (see `rkd_angle`), on logits or on tapped features."""

    def _compare(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        return rkd_angle(student, teacher.to(student.dtype), valid=valid)


def _valid(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dim() == 1 else mask.any(dim=1)


def relation_kl(student: Tensor, teacher: Tensor, *, heads: int, token_mask: Tensor | None = None) -> Tensor:
    """Compare how each token relates to all others, head by head.

    Wang et al. 2021, "MiniLMv2", arXiv 2012.15828, section 3.1: KL(teacher || student) of softmax(A A^T / sqrt(d)),
    averaged over heads and the tokens of a sample, then over the samples.

    Args:
        student: Queries, keys or values `(B, T, Ds)` before the split into attention heads.
        teacher: `(B, T, Dt)`; the widths may differ.
        heads: Number of relation heads; must divide both widths.
        token_mask: Bool `(B, T)`; False tokens neither relate nor are related to.
    """
    with exact(student):
        ours, theirs = (_log_relations(at_least_float32(x), heads, token_mask) for x in (student, teacher))
    divergence = kl(theirs.to(ours.dtype), ours).mean(dim=1)  # (B, T)
    return mean_per_sample(divergence, token_mask).mean()


def _log_relations(x: Tensor, heads: int, token_mask: Tensor | None) -> Tensor:
    if x.shape[-1] % heads:
        raise ConfigError(
            f"relation_heads={heads} does not divide a layer's width {x.shape[-1]}; choose a common divisor"
        )
    x = blank(x, token_mask).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, T, d)
    scores = x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.log_softmax(dim=-1)


class MiniLMRelations(LayerLoss):
    """Keep the relations between tokens inside queries, keys and values (MiniLMv2; see `relation_kl`).

    The widths and numbers of attention heads of the two networks may differ. Needs no projector.

    Args:
        layers: Student layer pattern -> teacher layer pattern, such as `{"encoder.layer.2": "encoder.layer.10"}`.
        relation_heads: Number of relation heads; must divide both widths.
        projections: Modules inside a layer that give queries, keys and values; with `fused` the one that gives all.
        teacher_projections: The same inside the teacher's layers. None: as in the student.
        fused: A projection's output holds queries, keys and values side by side and is split in three.
        weights: Weight of each relation: query-query, key-key, value-value.
    """

    averages_over = "samples"

    def __init__(
        self,
        layers: Mapping[str, str],
        *,
        relation_heads: int = 12,
        projections: Sequence[str] = ("attention.self.query", "attention.self.key", "attention.self.value"),
        teacher_projections: Sequence[str] | None = None,
        fused: bool = False,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        theirs = projections if teacher_projections is None else teacher_projections
        wanted = 1 if fused else 3
        if len(projections) != wanted or len(theirs) != wanted:
            raise ValueError(
                f"projections={list(projections)} and teacher_projections={list(theirs)}: give {wanted} each"
            )
        if relation_heads < 1 or len(weights) != 3:
            raise ValueError(
                f"relation_heads={relation_heads} must be at least 1 and weights={list(weights)} three numbers"
            )
        names = zip(projections, theirs, strict=True)
        super().__init__({f"{s}.{mine}": f"{t}.{other}" for mine, other in names for s, t in layers.items()})
        self.relation_heads, self.fused, self.weights = relation_heads, fused, tuple(weights)

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        pairs = self.pairs(student, teacher)
        if self.fused:
            split = [list(zip(_thirds(s), _thirds(t), strict=True)) for s, t in pairs]
            pairs = [parts[kind] for kind in range(3) for parts in split]
        each = len(pairs) // 3
        terms = [
            self.weights[position // each]
            * relation_kl(s, t, heads=self.relation_heads, token_mask=supervision.token_mask)
            for position, (s, t) in enumerate(pairs)
        ]
        return torch.stack(terms).sum()


def _thirds(x: Tensor) -> tuple[Tensor, ...]:
    if x.shape[-1] % 3:
        raise ConfigError(
            f"fused=True: a projection of width {x.shape[-1]} does not hold queries, keys and values alike"
        )
    return x.chunk(3, dim=-1)
