"""Data, teachers and our arms."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from setting import Loss, Pair, cross_entropy, fresh, logits_of, train
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.data import Compose, Digits, Mnist1d, Mnist5k, RandomAffine, RandomShift
from lightning_opt.data.augment import Transform
from lightning_opt.data.base import DataModule
from lightning_opt.losses import DIST, DKD, KD, DistillationLoss, Signals, StandardizedKD, Supervision

_DATA: dict[str, type[DataModule]] = {"mnist5k": Mnist5k, "digits": Digits, "digits_pooled": Digits, "mnist1d": Mnist1d}
# What the teachers saw and the students do not.
_AUGMENT: dict[str, Transform] = {
    "mnist5k": Compose([RandomAffine(degrees=12.0, scale=0.12), RandomShift(pixels=2)]),
    "digits": RandomAffine(degrees=8.0, scale=0.08),
    "digits_pooled": RandomAffine(degrees=8.0, scale=0.08),
    "mnist1d": RandomShift(pixels=3),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """The fixed parts of a data set; `views` are the teacher's versions of the training samples `(V, N, ...)`."""

    inputs: Tensor
    labels: Tensor
    views: Tensor
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read(pair: Pair) -> Data:
    """Read a data set through the package's data module, with its own split."""
    module = _DATA[pair.name](augment=_AUGMENT[pair.name], variants=pair.variants, **pair.data)
    module.prepare_data()
    splits = module.splits
    everything = range(len(splits.train))
    views = [splits.train.__getitems__([(v, i) for i in everything])[0] for v in range(pair.variants)]
    plain = type(module)(**pair.data).splits  # not .plain(): normalisation differs with augmentation
    inputs, labels, _ = plain.train.__getitems__(list(everything))
    val, test = (part.__getitems__(list(range(len(part))))[:2] for part in (plain.val, plain.test))
    return Data(inputs=inputs, labels=labels, views=torch.stack(views), val=val, test=test)


def teachers_of(pair: Pair, data: Data) -> list[nn.Module]:
    """Train the teacher, or each member of an ensemble, on augmented samples."""
    members = [fresh(pair.teacher, seed) for seed in range(pair.members)]
    for seed, member in enumerate(members):
        train(
            member,
            data.views,
            data.labels,
            cross_entropy,
            batch=pair.batch,
            epochs=pair.teacher_epochs,
            lr=pair.teacher_lr,
            seed=seed,
        )
    return members


def answers_of(members: list[nn.Module], inputs: Tensor) -> Tensor:
    """Return the mean logits of all members."""
    return torch.stack([logits_of(member, inputs) for member in members]).mean(dim=0)


def distil(term: DistillationLoss, *, weight: float = 1.0, task_weight: float = 0.0) -> Loss:
    """Add one of our losses to the cross-entropy with the labels, as `loss.task_weight` and a term's weight do."""

    def loss(logits: Tensor, told: Tensor | None, labels: Tensor, progress: float) -> Tensor:
        assert told is not None
        supervision = Supervision(labels=labels, progress=progress)
        value = weight * term(Signals(logits=logits), Signals(logits=told), supervision)
        return value + task_weight * F.cross_entropy(logits, labels) if task_weight else value

    return loss


def candidates() -> dict[str, Callable[[], Loss]]:
    """Name the recipes among which the validation part chooses."""
    return {
        "KD T=4, 0.9 + 0.1 labels": plain_kd,
        "KD T=2": lambda: distil(KD(temperature=2.0)),
        "KD T=4": lambda: distil(KD(temperature=4.0)),
        "KD T=8": lambda: distil(KD(temperature=8.0)),
        "StandardizedKD T=2, 9 + 1 labels": lambda: distil(StandardizedKD(), weight=9.0, task_weight=1.0),
        "DIST 2 + 1 labels": lambda: distil(DIST(), weight=2.0, task_weight=1.0),
    }


def plain_kd() -> Loss:
    """Hinton's loss at the usual setting."""
    return distil(KD(temperature=4.0), weight=0.9, task_weight=0.1)


def plain_dkd() -> Loss:
    """Return DKD at its authors' setting for CIFAR, labels at full weight, warm-up 20 of 240 epochs."""
    return distil(DKD(alpha=1.0, beta=8.0, temperature=4.0, warmup=20 / 240), task_weight=1.0)
