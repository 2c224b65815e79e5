"""What every arm shares: data, nets, one Lightning training loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.data import Digits, MiniLMTokenizer, Mnist1d, Mnist5k, MovieReviews
from lightning_opt.models import MLP, ConvNet1d, LeNet, TextEncoder

Labelled = tuple[Tensor, Tensor]
PAD = 0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A data set, a net, and how long it is trained.

    Attributes:
        net: Makes the net.
        data: Makes the data module.
        epochs: Of float training; half as many follow, in float or quantized.
        lr: Highest learning rate of float training.
        seeds: Nets of each arm.
        text: Rows are padded tokens, cut to the longest of a batch.
    """

    name: str
    net: Callable[[], nn.Module]
    data: Callable[[], Any]
    batch: int
    epochs: int
    lr: float
    seeds: int = 5
    text: bool = False

    @property
    def extra(self) -> int:
        """Return the epochs after float training."""
        return self.epochs // 2


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="mnist1d",
            net=lambda: ConvNet1d(num_outputs=10, widths=(32, 64, 64), length=40, dropout=0.1),
            data=Mnist1d,
            batch=64,
            epochs=10,
            lr=5e-3,
        ),
        Pair(
            name="digits",
            net=lambda: LeNet(num_outputs=10, image_size=8, widths=(32, 64), stride=2, hidden=64, dropout=0.1),
            data=lambda: Digits(test_fraction=0.4),
            batch=32,
            epochs=20,
            lr=5e-3,
        ),
        Pair(
            name="mnist5k",
            net=lambda: MLP(num_outputs=10, in_features=28 * 28, hidden=(128, 64), dropout=0.1),
            data=Mnist5k,
            batch=64,
            epochs=12,
            lr=2e-3,
        ),
        Pair(
            name="movie_reviews",
            net=lambda: TextEncoder(
                num_outputs=2, vocab_size=30_522, dim=128, embedding_dim=64, pad_id=PAD, dropout=0.1
            ),
            data=lambda: MovieReviews(tokenizer=MiniLMTokenizer()),
            batch=32,
            epochs=2,
            lr=1e-3,
            seeds=3,
            text=True,
        ),
    )
}


@dataclass(frozen=True)
class Data:
    """Inputs and labels of each part."""

    train: Labelled
    val: Labelled
    test: Labelled
    text: bool

    def cut(self, rows: Labelled) -> Labelled:
        """Cut texts to the longest of the batch, in steps of 8 tokens."""
        if not self.text:
            return rows
        longest = int((rows[0] != PAD).sum(dim=1).max())
        return rows[0][:, : -(-longest // 8) * 8], rows[1]

    def calibration(self, samples: int = 512, batch: int = 64) -> list[Tensor]:
        """Return the inputs of the first training samples, in batches."""
        parts = zip(self.train[0][:samples].split(batch), self.train[1][:samples].split(batch), strict=True)
        return [self.cut(part)[0] for part in parts]


def read(pair: Pair) -> Data:
    """Read a data set as it is, without augmentation, with the package's own split."""
    module = pair.data()
    module.prepare_data()
    parts = (module.splits.train, module.splits.val, module.splits.test)
    if pair.text:
        return Data(*((part.ids.long(), part.labels) for part in parts), text=True)
    return Data(*(part.__getitems__(list(range(len(part))))[:2] for part in parts), text=False)


def fresh(pair: Pair, seed: int) -> nn.Module:
    """Build a net whose first weights depend on `seed` alone."""
    torch.manual_seed(seed)
    return pair.net()


@dataclass
class Batches:
    """All batches of an epoch, in an order that depends on seed and epoch; the last incomplete one is dropped."""

    data: Data
    batch: int
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.data.train[1]) // self.batch

    def __iter__(self) -> Iterator[Labelled]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        self.epoch += 1
        inputs, labels = self.data.train
        for rows in torch.randperm(len(labels), generator=generator).split(self.batch)[: len(self)]:
            yield self.data.cut((inputs[rows], labels[rows]))


class Training(pl.LightningModule):
    """Cross-entropy, AdamW, 5 % warm-up, then half a cosine to 0.

    Args:
        model: Any net.
        lr: Highest learning rate.
        scales: Share of it for learned scales, which then do not decay: Adam's steps do not depend on how large a
            gradient is, and a scale is small. None: as all others.
    """

    def __init__(self, model: nn.Module, *, lr: float, scales: float | None = None) -> None:
        super().__init__()
        self.model, self.lr, self.scales = model, lr, scales

    def training_step(self, batch: Labelled, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return F.cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        groups: list[dict[str, Any]] = [{"params": list(self.parameters())}]
        if self.scales is not None:
            named = list(self.named_parameters())
            groups = [{"params": [p for name, p in named if "quantizer" not in name]}]
            slow = [p for name, p in named if "quantizer" in name]
            groups.append({"params": slow, "lr": self.scales * self.lr, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=0.01, fused=True)
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
    lr: float,
    epochs: int,
    first_epoch: int = 0,
    callbacks: Sequence[pl.Callback] = (),
    scales: float | None = None,
) -> int:
    """Train a model in place and return the number of optimizer steps.

    Args:
        model: Any net.
        data: What it is trained on.
        pair: Says how.
        seed: Of the order of samples, and of dropout.
        lr: Highest learning rate.
        epochs: Passes.
        first_epoch: Passes that were made before, so that the order goes on.
        callbacks: What quantizes.
        scales: As in `Training`.
    """
    torch.manual_seed(50_000 + seed + 100 * first_epoch)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        gradient_clip_val=1.0 if pair.text else None,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model.train()  # Lightning leaves the mode as it is
    trainer.fit(Training(model, lr=lr, scales=scales), train_dataloaders=Batches(data, pair.batch, seed, first_epoch))
    return int(trainer.global_step)


@torch.no_grad()
def quality(model: nn.Module, data: Data, part: str) -> dict[str, float]:
    """Return the share of right answers in percent, and the mean cross-entropy in nats."""
    model.eval()
    inputs, labels = getattr(data, part)
    pieces = [data.cut(rows) for rows in zip(inputs.split(256), labels.split(256), strict=True)]
    logits = torch.cat([model(rows).float() for rows, _ in pieces]).double()
    right = (logits.argmax(dim=1) == labels).double().mean().item()
    return {"acc": round(100.0 * right, 4), "nll": round(F.cross_entropy(logits, labels).item(), 5)}


def parameters(model: nn.Module) -> int:
    """Count the numbers that are trained."""
    return sum(p.numel() for p in model.parameters())
