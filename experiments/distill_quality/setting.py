"""What every arm shares: the pairs, the nets, one plain training loop. Needs torch and our models, not Lightning."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.models import BagOfEmbeddings, ConvNet1d, LeNet

# Loss of one batch: (student logits, teacher logits, labels, progress in [0, 1]) -> scalar.
Loss = Callable[[Tensor, Tensor | None, Tensor, float], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A data set, a teacher and a student, and how long each is trained.

    Attributes:
        teacher: None: it comes from a folder.
        variants: Seeded versions of each training sample.
        span_share: Of the text pair: the share of the samples of a version of which a span is shown, not the whole.
    """

    name: str
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module] | None = None
    batch: int
    epochs: int
    lr: float
    teacher_epochs: int = 0
    teacher_lr: float = 0.0
    variants: int
    span_share: float = 0.0
    seeds: int = 10
    data: dict[str, Any] = field(default_factory=dict)


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="mnist5k",
            teacher=lambda: LeNet(num_outputs=10, image_size=28, widths=(16, 32, 64), hidden=64, dropout=0.3),
            student=lambda: LeNet(num_outputs=10, image_size=28, widths=(8, 16), stride=2, hidden=None),
            batch=64,
            epochs=30,
            lr=5e-3,
            teacher_epochs=20,
            teacher_lr=2e-3,
            variants=20,
        ),
        Pair(
            name="digits",
            teacher=lambda: LeNet(num_outputs=10, image_size=8, widths=(32, 32, 64), hidden=None, dropout=0.3),
            student=lambda: LeNet(num_outputs=10, image_size=8, widths=(6, 8), stride=2, hidden=None),
            batch=32,
            epochs=40,
            lr=5e-3,
            teacher_epochs=20,
            teacher_lr=2e-3,
            variants=20,
            data={"test_fraction": 0.4},
        ),
        Pair(
            name="digits_pooled",
            teacher=lambda: LeNet(num_outputs=10, image_size=8, widths=(32, 32, 64), hidden=None, dropout=0.3),
            student=lambda: LeNet(num_outputs=10, image_size=8, widths=(4, 4, 8), hidden=None),
            batch=32,
            epochs=60,
            lr=5e-3,
            teacher_epochs=20,
            teacher_lr=2e-3,
            variants=20,
            data={"test_fraction": 0.4, "val_fraction": 0.2, "split_seed": 1},
        ),
        Pair(
            name="mnist1d",
            teacher=lambda: ConvNet1d(num_outputs=10, widths=(64, 64, 128), length=40, dropout=0.2),
            student=lambda: ConvNet1d(num_outputs=10, widths=(16, 16), length=40),
            batch=64,
            epochs=30,
            lr=5e-3,
            teacher_epochs=40,
            teacher_lr=3e-3,
            variants=40,
        ),
        Pair(
            name="movie_reviews",
            student=lambda: BagOfEmbeddings(num_outputs=2, vocab_size=30522, dim=32, pad_id=0),
            batch=32,
            epochs=8,
            lr=3e-3,
            variants=8,
            span_share=0.5,
            seeds=5,
        ),
    )
}


def fresh(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a net whose first weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return make()


def batches(count: int, *, batch: int, epochs: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (epoch, positions): a new order each epoch, the last incomplete batch dropped."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for epoch in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(batch):
            if len(rows) == batch:
                yield epoch, rows


def rate(step: int, total: int, peak: float) -> float:
    """Warm up over 5 % of the steps, then half a cosine to 0: conf/scheduler/cosine.yaml."""
    warm = round(0.05 * total)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / (total - warm)))


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    loss: Loss,
    *,
    answers: Tensor | None = None,
    batch: int,
    epochs: int,
    lr: float,
    seed: int,
) -> float:
    """Train `model` in place and return the CPU seconds.

    Args:
        model: Any net.
        inputs: `(V, N, ...)`; epoch e sees version e % V of each sample.
        labels: `(N,)`.
        loss: Of one batch.
        answers: The teacher's logits `(V, N, C)`.
        batch: Samples in a batch.
        epochs: Passes.
        lr: Highest learning rate of AdamW.
        seed: Of the order of the samples.
    """
    started = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    count = len(labels)
    total = epochs * (count // batch)
    model.train()
    for step, (epoch, rows) in enumerate(batches(count, batch=batch, epochs=epochs, seed=seed)):
        version = epoch % len(inputs)
        optimizer.param_groups[0]["lr"] = rate(step, total, lr)
        told = None if answers is None else answers[version, rows]
        value = loss(model(inputs[version, rows]), told, labels[rows], step / total)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    model.eval()
    return time.process_time() - started


def cross_entropy(logits: Tensor, told: Tensor | None, labels: Tensor, progress: float) -> Tensor:
    """Learn from the labels alone."""
    return F.cross_entropy(logits, labels)


def smoothed_cross_entropy(logits: Tensor, told: Tensor | None, labels: Tensor, progress: float) -> Tensor:
    """Learn from labels that keep 10 % for all classes."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the answers `(N, C)` of a net in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in inputs.split(512)])


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of right answers, in percent."""
    return 100.0 * (logits_of(model, inputs).argmax(dim=1) == labels).double().mean().item()


def parameters(model: nn.Module) -> int:
    """Count the numbers that are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
