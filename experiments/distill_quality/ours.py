"""Data, teachers and our arms."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import text
import torch
from setting import Loss, Pair, accuracy, cross_entropy, fresh, logits_of, parameters, smoothed_cross_entropy, train
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.data import Compose, Digits, Mnist1d, Mnist5k, RandomAffine, RandomShift
from lightning_opt.data.augment import Transform
from lightning_opt.data.base import DataModule
from lightning_opt.losses import DKD, KD, DistillationLoss, Signals, StandardizedKD, Supervision

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
    """What the arms of a pair see and are told.

    Attributes:
        labels: Of the training samples `(N,)`.
        seen: Training inputs `(V, N, ...)`: "plain", the samples; "versions", what our recipe's student sees.
        told: The teacher's logits `(V, N, C)` for each of these; "untrained": those of an untrained one, plain.
        val: Inputs and labels.
        test: The same.
        teacher: What is known of it.
    """

    labels: Tensor
    seen: dict[str, Tensor]
    told: dict[str, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    teacher: dict[str, float]


def read(pair: Pair, text_teacher: Path | None = None) -> Data:
    """Read a data set through the package's data module, with its own split, and ask its teacher."""
    if pair.teacher is None:
        if text_teacher is None:
            raise SystemExit(f"{pair.name} needs --text-teacher FOLDER, see README.md")
        return _read_text(pair, text_teacher)
    module = _DATA[pair.name](augment=_AUGMENT[pair.name], variants=pair.variants, **pair.data)
    module.prepare_data()
    splits = module.splits
    everything = range(len(splits.train))
    views = torch.stack([splits.train.__getitems__([(v, i) for i in everything])[0] for v in range(pair.variants)])
    plain = type(module)(**pair.data).splits  # not .plain(): normalisation differs with augmentation
    inputs, labels, _ = plain.train.__getitems__(list(everything))
    val, test = (part.__getitems__(list(range(len(part))))[:2] for part in (plain.val, plain.test))
    started = time.process_time()
    teacher = _teach(pair, views, labels)
    seconds = time.process_time() - started
    told = {
        "plain": logits_of(teacher, inputs)[None],
        "versions": torch.stack([logits_of(teacher, view) for view in views]).mean(dim=0, keepdim=True),
        "untrained": logits_of(fresh(pair.teacher, 1000), inputs)[None],
    }
    known = {"val": accuracy(teacher, *val), "test": accuracy(teacher, *test)}
    known |= {"parameters": parameters(teacher), "cpu_s": round(seconds, 1)}
    # The student sees the samples as they are; only the teacher is asked about their versions.
    seen = {"plain": inputs[None], "versions": inputs[None]}
    return Data(labels=labels, seen=seen, told=told, val=val, test=test, teacher=known)


def _read_text(pair: Pair, folder: Path) -> Data:
    found = text.read_text(pair, folder)
    seen, told = text.versions_of(pair, found)
    generator = torch.Generator().manual_seed(1000)
    known: dict[str, float] = {"parameters": parameters(text.load_teacher(folder))}
    for part in ("val", "test"):
        right = found[f"{part}_answers"].argmax(dim=1) == found[f"{part}_labels"]
        known[part] = 100.0 * right.double().mean().item()
    return Data(
        labels=found["train_labels"],
        seen={"plain": found["train_ids"][None], "versions": seen},
        told={
            "plain": found["train_answers"][None],
            "versions": told,
            # An untrained MiniLM would have to be run; answers that belong to other samples tell as little.
            "untrained": found["train_answers"][torch.randperm(len(seen[0]), generator=generator)][None],
        },
        val=(found["val_ids"], found["val_labels"]),
        test=(found["test_ids"], found["test_labels"]),
        teacher=known,
    )


def _teach(pair: Pair, views: Tensor, labels: Tensor) -> nn.Module:
    """Train the teacher on augmented samples."""
    assert pair.teacher is not None
    teacher = fresh(pair.teacher, 0)
    epochs, rate = pair.teacher_epochs, pair.teacher_lr
    train(teacher, views, labels, cross_entropy, batch=pair.batch, epochs=epochs, lr=rate, seed=0)
    return teacher


def distil(term: DistillationLoss, *, weight: float = 1.0, task_weight: float = 0.0) -> Loss:
    """Add one of our losses to the cross-entropy with the labels, as `loss.task_weight` and a term's weight do."""

    def loss(logits: Tensor, told: Tensor | None, labels: Tensor, progress: float) -> Tensor:
        assert told is not None
        supervision = Supervision(labels=labels, progress=progress)
        value = weight * term(Signals(logits=logits), Signals(logits=told), supervision)
        return value + task_weight * F.cross_entropy(logits, labels) if task_weight else value

    return loss


def first_choice() -> dict[str, Callable[[], Loss]]:
    """Name what won among six losses on each pair's small validation part, in the first round."""
    return {
        "mnist5k": lambda: distil(KD(temperature=4.0)),
        "digits": lambda: distil(StandardizedKD(), weight=9.0, task_weight=1.0),
        "mnist1d": lambda: distil(KD(temperature=2.0)),
    }


def recipe(pair: Pair) -> Callable[[], Loss]:
    """Return our loss for a pair: of images and signals, or of text."""
    return plain_kd if pair.teacher is not None else lambda: distil(KD(temperature=2.0), task_weight=0.3)


def arms_of(pair: Pair) -> dict[str, tuple[Callable[[], Loss], str, str | None]]:
    """Name our arms: a loss, what the student sees, and what it is told."""
    arms: dict[str, tuple[Callable[[], Loss], str, str | None]] = {
        "alone": (lambda: cross_entropy, "plain", None),
        "label_smoothing": (lambda: smoothed_cross_entropy, "plain", None),
        "random_teacher": (plain_kd, "plain", "untrained"),
        "kd": (plain_kd, "plain", "plain"),
        "dkd": (plain_dkd, "plain", "plain"),
        "ours": (recipe(pair), "versions", "versions"),
    }
    if pair.name in first_choice():
        arms["first_choice"] = (first_choice()[pair.name], "plain", "plain")
    if pair.teacher is None:  # elsewhere our student sees what the student alone sees
        arms["alone_versions"] = (lambda: cross_entropy, "versions", None)
    return arms


def plain_kd() -> Loss:
    """Hinton's loss at the usual setting."""
    return distil(KD(temperature=4.0), weight=0.9, task_weight=0.1)


def plain_dkd() -> Loss:
    """Return DKD at its authors' setting for CIFAR, labels at full weight, warm-up 20 of 240 epochs."""
    return distil(DKD(alpha=1.0, beta=8.0, temperature=4.0, warmup=20 / 240), task_weight=1.0)
