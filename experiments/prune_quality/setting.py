"""What every arm shares: data, nets, one Lightning training loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.data import Digits, Mnist1d, Mnist5k
from lightning_opt.losses import KD, Signals, Supervision
from lightning_opt.models import MLP, ConvNet1d, LeNet

Labelled = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A data set, a net, and how long it is trained.

    Attributes:
        net: Makes the net; 1.0 is the one that is pruned, less makes all of its inner widths smaller.
        data: Makes the data module.
        epochs: Even: some arms train the dense net for half of them.
        lr: Highest learning rate.
    """

    name: str
    net: Callable[[float], nn.Module]
    data: Callable[[], Any]
    batch: int
    epochs: int
    lr: float


def widths(share: float, *full: int) -> list[int]:
    """Scale widths, at least 1 each."""
    return [max(1, round(share * width)) for width in full]


def _le_net(size: int, first: int, second: int, hidden: int) -> Callable[[float], nn.Module]:
    def make(share: float) -> nn.Module:
        a, b, c = widths(share, first, second, hidden)
        return LeNet(num_outputs=10, image_size=size, widths=(a, b), stride=2, hidden=c, dropout=0.1)

    return make


def _signals(share: float) -> nn.Module:
    return ConvNet1d(num_outputs=10, widths=widths(share, 32, 64, 64), length=40, dropout=0.1)


def _perceptron(share: float) -> nn.Module:
    return MLP(num_outputs=10, in_features=28 * 28, hidden=widths(share, 128, 64), dropout=0.1)


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="digits",
            net=_le_net(8, 32, 64, 64),
            data=lambda: Digits(test_fraction=0.4),
            batch=32,
            epochs=20,
            lr=5e-3,
        ),
        Pair(name="mnist1d", net=_signals, data=lambda: Mnist1d(), batch=64, epochs=10, lr=5e-3),
        Pair(name="mnist5k", net=_perceptron, data=lambda: Mnist5k(), batch=64, epochs=12, lr=2e-3),
    )
}


@dataclass(frozen=True)
class Data:
    """Inputs and labels of each part."""

    train: Labelled
    val: Labelled
    test: Labelled


def read(pair: Pair) -> Data:
    """Read a data set as it is, without augmentation, with the package's own split."""
    module = pair.data()
    module.prepare_data()
    parts = (module.splits.train, module.splits.val, module.splits.test)
    return Data(*(part.__getitems__(list(range(len(part))))[:2] for part in parts))


def fresh(pair: Pair, seed: int, share: float = 1.0) -> nn.Module:
    """Build a net whose first weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return pair.net(share)


@dataclass
class Batches:
    """All batches of an epoch, in an order that depends on seed and epoch; the last incomplete one is dropped."""

    data: Labelled
    batch: int
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.data[1]) // self.batch

    def __iter__(self) -> Iterator[Labelled]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        self.epoch += 1
        for rows in torch.randperm(len(self.data[1]), generator=generator).split(self.batch)[: len(self)]:
            yield self.data[0][rows], self.data[1][rows]


@dataclass(frozen=True)
class Teacher:
    """A net to learn from besides the labels."""

    net: nn.Module
    temperature: float = 2.0
    weight: float = 0.5
    loss: KD = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", KD(temperature=self.temperature))
        self.net.eval().requires_grad_(False)

    def add(self, value: Tensor, logits: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mix the loss with that of the teacher's answers."""
        with torch.no_grad():
            told = self.net(inputs)
        term = self.loss(Signals(logits=logits), Signals(logits=told), Supervision(labels=labels, progress=0.0))
        return (1.0 - self.weight) * value + self.weight * term


class Training(pl.LightningModule):
    """Cross-entropy, AdamW, 5 % warm-up, then half a cosine to 0."""

    def __init__(self, model: nn.Module, *, lr: float, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        self._teacher = [teacher]  # in a list, so that it is no part of the module

    def training_step(self, batch: Labelled, batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.model(inputs)
        value, teacher = F.cross_entropy(logits, labels), self._teacher[0]
        return value if teacher is None else teacher.add(value, logits, inputs, labels)

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate(step: int, total: int) -> float:
    """Return the share of the highest learning rate: conf/scheduler/cosine.yaml."""
    warm = round(0.05 * total)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / (total - warm)))


def train(
    model: nn.Module,
    data: Data,
    pair: Pair,
    *,
    seed: int,
    epochs: int | None = None,
    first_epoch: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    teacher: Teacher | None = None,
) -> int:
    """Train a model in place and return the number of optimizer steps.

    Args:
        model: Any net.
        data: What it is trained on.
        pair: Says how.
        seed: Of the order of samples, and of dropout.
        epochs: Passes; all of the pair's when not given.
        first_epoch: Passes that were made before, so that the order goes on.
        callbacks: What prunes.
        teacher: The unpruned self.
    """
    torch.manual_seed(50_000 + seed + 100 * first_epoch)
    trainer = pl.Trainer(
        max_epochs=epochs or pair.epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Training(model, lr=pair.lr, teacher=teacher)
    trainer.fit(module, train_dataloaders=Batches(data.train, pair.batch, seed, first_epoch))
    return int(trainer.global_step)


@torch.no_grad()
def accuracy(model: nn.Module, part: Labelled) -> float:
    """Return the share of right answers, in percent."""
    model.eval()
    logits = torch.cat([model(rows) for rows in part[0].split(512)])
    return 100.0 * (logits.argmax(dim=1) == part[1]).double().mean().item()


def weights_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name the modules whose weights are pruned: convolutions and linear layers."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def sparsity(model: nn.Module) -> float:
    """Return the share of these weights that are zero."""
    weights: list[Any] = [module.weight for module in weights_of(model).values()]
    return 1.0 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def parameters(model: nn.Module, *, nonzero: bool = False) -> int:
    """Count the numbers that are trained, or those that are not zero."""
    return sum(int(p.count_nonzero()) if nonzero else p.numel() for p in model.parameters())
