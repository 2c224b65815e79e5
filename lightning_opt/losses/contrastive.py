"""Contrastive distillation: a student's sample must resemble the teacher's view of it and no other."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from lightning_opt.errors import ConfigError
from lightning_opt.losses.base import Signals, Supervision
from lightning_opt.losses.divergence import at_least_float32
from lightning_opt.losses.layers import LayerLoss, exact
from lightning_opt.losses.reduce import blank


def contrastive_nce(scores: Tensor, *, n_data: int, log_z: Tensor) -> Tensor:
    """Tell one positive from N negatives by noise-contrastive estimation.

    Tian, Krishnan & Isola 2020, "Contrastive Representation Distillation", arXiv 1910.10699, section 3,
    L_critic: h = p / (p + N / n_data), loss = -log h(positive) - sum of log(1 - h(negative)), averaged over the batch.

    Args:
        scores: `(B, 1 + N)` similarities over temperature; the positive comes first.
        n_data: Number of samples in the training set.
        log_z: Scalar; the log of the constant that makes p = exp(score) / Z a distribution.
    """
    odds = scores - log_z - math.log((scores.shape[1] - 1) / n_data)
    return (functional.softplus(-odds[:, 0]) + functional.softplus(odds[:, 1:]).sum(dim=1)).mean()


def draw_negatives(classes: Tensor, labels: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` samples of other classes for each anchor, evenly and with replacement: `(B, count)` positions.

    Args:
        classes: `(n_data,)` int64 class of each sample; -1 where it is not known yet, which counts as another class.
        labels: `(B,)` int64 class of each anchor.
        count: Number of negatives.
        generator: On the device of `classes`.
    """
    ordered, position = classes.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    own = torch.searchsorted(ordered, labels, right=True) - first
    others = (len(classes) - own).clamp(min=1)
    uniform = torch.rand(len(labels), count, generator=generator, device=classes.device, dtype=torch.float64)
    rank = (uniform * others[:, None]).long()
    rank = torch.where(rank < first[:, None], rank, rank + own[:, None])  # step over the anchor's own class
    return position[rank.clamp(max=len(classes) - 1)]


class CRD(LayerLoss):
    """Contrastive representation distillation with a memory bank (see `contrastive_nce`).

    Both features are projected to unit vectors. The student's is compared with the teacher's bank and the teacher's
    with the student's; then the batch's vectors enter the banks. Which negatives a step draws depends only on `seed`,
    the number of steps so far and the rank, so that a resumed run draws the same. With several processes all see each
    other's vectors, so that the banks stay equal. In eval mode nothing is remembered.

    Args:
        layers: One student pattern -> teacher pattern; maps are averaged over space and tokens over the sentence. None:
            the logits.
        n_data: Number of samples in the training set.
        n_negatives: Number of negatives for each sample.
        feature_dim: Width of the compared vectors.
        temperature: Divides the similarities.
        momentum: Share of a bank's old vector that is kept.
        by_class: Draw negatives of other classes only; False: of all other samples (for tasks without classes).
        seed: Seed of the negatives.
    """

    couples_samples = True
    needs: ClassVar[frozenset[str]] = frozenset({"features", "labels", "index"})
    bank_student: Tensor
    bank_teacher: Tensor
    classes: Tensor
    log_z: Tensor
    steps: Tensor

    def __init__(
        self,
        layers: Mapping[str, str] | None = None,
        *,
        n_data: int,
        n_negatives: int = 4096,
        feature_dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        by_class: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(layers)
        if min(n_data, n_negatives, feature_dim) < 1:
            raise ValueError(f"n_data={n_data}, n_negatives={n_negatives}, feature_dim={feature_dim} must be positive")
        if temperature <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"temperature={temperature} must be positive and momentum={momentum} in [0, 1)")
        self.n_data, self.n_negatives, self.feature_dim = n_data, n_negatives, feature_dim
        self.temperature, self.momentum, self.by_class, self.seed = temperature, momentum, by_class, seed
        self.embed_student: nn.Linear | None = None
        self.embed_teacher: nn.Linear | None = None
        self.register_buffer("bank_student", torch.zeros(n_data, feature_dim))
        self.register_buffer("bank_teacher", torch.zeros(n_data, feature_dim))
        self.register_buffer("classes", torch.full((n_data,), -1))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._steps = 0  # the same number without waiting for the device

    def build(self, student: Signals, teacher: Signals) -> None:
        """Make the two embeddings and fill the banks with random vectors, unless the widths are as at the last call."""
        ours, theirs = self._vectors(student, teacher, token_mask=None)
        widths = (ours.shape[1], theirs.shape[1])
        if self.embed_student and self.embed_teacher and widths == self._embedded():
            return
        self.embed_student = nn.Linear(widths[0], self.feature_dim).to(ours.device)
        self.embed_teacher = nn.Linear(widths[1], self.feature_dim).to(ours.device)
        with torch.no_grad():
            for bank in (self.bank_student, self.bank_teacher):
                bank.copy_(functional.normalize(torch.rand(bank.shape) - 0.5, dim=1))
        self.to(ours.device)

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        index, labels = self._keys(supervision)
        vectors = self._embed(student, teacher, supervision.token_mask)
        if self.training:  # before the draw: a sample must not be its own negative
            self.classes[_everywhere(index)] = _everywhere(labels)
        generator = torch.Generator(self.classes.device).manual_seed(self._draw_seed())
        negatives = draw_negatives(self.classes, labels, count=self.n_negatives, generator=generator)
        chosen = torch.cat([index[:, None], negatives], dim=1)
        terms = []
        with exact(vectors[0]):
            for side, (vector, bank) in enumerate(zip(vectors, (self.bank_teacher, self.bank_student), strict=True)):
                # One product with the whole bank costs less than to gather B x N vectors; autograd keeps the copy.
                scores = (vector @ bank.to(vector.dtype, copy=True).T / self.temperature).gather(1, chosen)
                terms.append(contrastive_nce(scores, n_data=self.n_data, log_z=self._constant(side, scores)))
        if self.training:
            self._remember(index, *vectors)
        return torch.stack(terms).sum()

    def _keys(self, supervision: Supervision) -> tuple[Tensor, Tensor]:
        index, labels = supervision.index, supervision.labels
        if index is None:
            raise ConfigError("CRD needs the position of each sample: use a data module that gives `index`")
        if index.device.type == "cpu" and int(index.max()) >= self.n_data:  # elsewhere reading it would cost a wait
            raise ConfigError(f"n_data={self.n_data} is less than the training set: it holds sample {int(index.max())}")
        if not self.by_class:
            return index, index
        if labels is None or labels.dim() != 1 or labels.is_floating_point():
            raise ConfigError("CRD needs one class a sample to draw negatives; set by_class=false for other labels")
        return index, labels

    def _vectors(self, student: Signals, teacher: Signals, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        pairs = self.pairs(student, teacher)
        if len(pairs) != 1:
            raise ConfigError(f"layers: CRD compares one pair of layers, and {self.layers} matches {len(pairs)}")
        return _pooled(pairs[0][0], token_mask), _pooled(pairs[0][1], token_mask)

    def _embed(self, student: Signals, teacher: Signals, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.embed_student is None or self.embed_teacher is None:
            raise RuntimeError("CRD has no embeddings yet: call build(student, teacher) with one example batch first")
        ours, theirs = self._vectors(student, teacher, token_mask)
        ours = self.embed_student(ours.to(self.embed_student.weight.dtype))
        theirs = self.embed_teacher(theirs.to(self.embed_teacher.weight.dtype))
        return functional.normalize(at_least_float32(ours), dim=1), functional.normalize(
            at_least_float32(theirs), dim=1
        )

    def _embedded(self) -> tuple[int, int]:
        assert self.embed_student is not None
        assert self.embed_teacher is not None
        return self.embed_student.in_features, self.embed_teacher.in_features

    def _draw_seed(self) -> int:
        rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
        return (self.seed * 1_000_003 + self._steps * world + rank) % 2**63

    @torch.no_grad()
    def _constant(self, side: int, scores: Tensor) -> Tensor:
        """Return log Z, which the first batch's scores set for good."""
        if self._steps:
            return self.log_z[side]
        log_z = (scores.logsumexp(dim=(0, 1)) - math.log(scores.numel() / self.n_data)).reshape(1)
        log_z = _everywhere(log_z).mean()
        if self.training:
            self.log_z[side] = log_z
        return log_z

    @torch.no_grad()
    def _remember(self, index: Tensor, student: Tensor, teacher: Tensor) -> None:
        index, student, teacher = (_everywhere(x.detach()) for x in (index, student, teacher))
        for bank, new in ((self.bank_student, student), (self.bank_teacher, teacher)):
            mixed = self.momentum * bank[index] + (1.0 - self.momentum) * new.to(bank.dtype)
            bank[index] = functional.normalize(mixed, dim=1)
        self.steps += 1
        self._steps += 1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = int(self.steps)


def _pooled(x: Tensor, token_mask: Tensor | None) -> Tensor:
    x = at_least_float32(x)
    if x.dim() == 4:
        return x.mean(dim=(2, 3))
    if x.dim() == 3 and token_mask is not None:
        return blank(x, token_mask).sum(dim=1) / token_mask.sum(dim=1, keepdim=True).clamp(min=1)
    return x.mean(dim=1) if x.dim() == 3 else x.reshape(len(x), -1)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _everywhere(x: Tensor) -> Tensor:
    """Join the tensors of all processes along the first axis."""
    if not _distributed() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
