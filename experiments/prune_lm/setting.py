"""Data, net and one plain training loop that every arm shares."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.data import Shakespeare
from lightning_opt.models import GPT

CONTEXT, WIDTH, HEADS, DEPTH, HIDDEN = 128, 96, 4, 4, 384
BATCH = 16
DENSE_STEPS, DENSE_LR = 500, 3e-3
RETRAIN_STEPS, RETRAIN_LR = 150, 2e-3
CALIBRATION_WINDOWS = 64
TEST_WINDOWS = 200

# Loss of one batch: (logits of the net, input ids, labels) -> scalar.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """Windows of characters: `train` is the running text, `test` is `(inputs, labels)`."""

    train: Tensor
    test: tuple[Tensor, Tensor]
    vocabulary: int


def read() -> Data:
    """Read the plays; the test part is windows spread evenly over plays that are not trained on."""
    module = Shakespeare(context_length=CONTEXT)
    module.prepare_data()
    train, test = module.splits.train, module.splits.test
    batch = test.__getitems__(torch.linspace(0, len(test) - 2, TEST_WINDOWS).round().long().tolist())
    stream = train.stream[: train.length].long()
    return Data(train=stream, test=(batch["input_ids"], batch["labels"]), vocabulary=module.vocab_size)


def net(data: Data, seed: int, *, depth: int = DEPTH, hidden: int = HIDDEN) -> nn.Module:
    """Build a GPT whose first weights depend on the seed alone."""
    torch.manual_seed(seed)
    return GPT(
        vocab_size=data.vocabulary,
        context_length=CONTEXT,
        dim=WIDTH,
        depth=depth,
        heads=HEADS,
        mlp_ratio=hidden / WIDTH,
    )


def windows(data: Data, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw windows of the training text: inputs and the characters that follow."""
    starts = torch.randint(0, len(data.train) - CONTEXT - 1, (count,), generator=generator)
    tokens = data.train[starts[:, None] + torch.arange(CONTEXT + 1)]
    return tokens[:, :-1], tokens[:, 1:]


def rate(step: int, total: int, peak: float) -> float:
    """Warm up over 5 % of the steps, then half a cosine to a tenth."""
    warm = max(round(0.05 * total), 1)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.45 * (1.0 + math.cos(math.pi * (step - warm) / (total - warm))))


def train(model: nn.Module, data: Data, loss: Loss, *, steps: int, lr: float, seed: int) -> float:
    """Train in place and return the CPU seconds; the order of the windows depends on the seed alone."""
    started = time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate(step, steps, lr)
        inputs, labels = windows(data, BATCH, generator)
        value = loss(model(inputs), inputs, labels)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return time.process_time() - started


def cross_entropy(logits: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Learn from the text alone."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def perplexity(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Return the perplexity a character on held-out windows."""
    model.eval()
    inputs, labels = part
    nats = sum(
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
        for x, y in zip(inputs.split(50), labels.split(50), strict=True)
    )
    return math.exp(nats / labels.numel())


def parameters(model: nn.Module) -> int:
    """Count the numbers that are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
