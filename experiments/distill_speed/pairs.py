"""The pairs of networks, their data in memory, and the teacher in its cheapest correct mode."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.evaluation.engines import cpu_has_bfloat16
from lightning_opt.models import MLP, CifarResNet, TextEncoder
from lightning_opt.tasks import Example

ENDLESS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is trained, from what, on what; random data, since time does not depend on it.

    Attributes:
        name: What the table calls it.
        teacher: Makes the teacher.
        student: Makes the student.
        classes: Number of classes.
        data: Gives so many samples, without labels.
        optimizer: Makes the optimizer.
        batch: Samples a batch.
        batches: Different batches, which come again and again.
        block: Steps that a contender does in its turn.
    """

    name: str
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    classes: int
    data: Callable[[int], dict[str, Tensor]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch: int = 64
    batches: int = 4
    block: int = 1

    def tensors(self) -> dict[str, Tensor]:
        torch.manual_seed(0)
        count = self.batch * self.batches
        labels = torch.randint(self.classes, (count,))
        return {**self.data(count), "labels": labels, "index": torch.arange(count)}


class Batches:
    """Go through ready batches again and again, as one very long epoch."""

    def __init__(self, tensors: dict[str, Tensor], *, batch: int) -> None:
        chunks = (
            {name: value[at : at + batch] for name, value in tensors.items()}
            for at in range(0, len(tensors["labels"]), batch)
        )
        self.ready = [as_batch(chunk) for chunk in chunks]

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        return (self.ready[number % len(self.ready)] for number in range(ENDLESS))


def as_batch(tensors: dict[str, Tensor]) -> Any:
    """Images: `(x, y, index)`; texts: a dict, as the data modules give them."""
    return (tensors["x"], tensors["labels"], tensors["index"]) if "x" in tensors else tensors


def split(batch: Any) -> tuple[Any, Tensor]:
    """Read inputs and labels, as a loop written by hand for one data set would."""
    if isinstance(batch, dict):
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, batch["labels"]
    return batch[0], batch[1]


def call(model: nn.Module, inputs: Any) -> Tensor:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


@dataclass(frozen=True)
class Mode:
    """One correct way to ask a teacher: eval, no gradients, and this."""

    name: str
    model: nn.Module
    dtype: str | None = None
    inference: bool = False

    def answer(self, inputs: Any) -> Tensor:
        with torch.inference_mode() if self.inference else torch.no_grad():
            if self.dtype is not None and not isinstance(inputs, dict):
                inputs = inputs.to(getattr(torch, self.dtype))
            return call(self.model, inputs).float()


def modes(pair: Pair) -> list[Mode]:
    """Return the ways that this machine offers; bfloat16 only where the CPU multiplies it in hardware."""
    torch.manual_seed(1)
    plain = pair.teacher().eval().requires_grad_(False)
    found = [Mode("no_grad", plain), Mode("inference_mode", plain, inference=True)]
    if any(isinstance(module, nn.Conv2d) for module in plain.modules()):
        # Weights alone decide the layout: a convolution hands it on to all that follow.
        other = nn.Module.to(copy.deepcopy(plain), memory_format=torch.channels_last)  # type: ignore[call-overload]
        found.append(Mode("channels_last", other))
    if cpu_has_bfloat16():
        found.append(Mode("bfloat16", copy.deepcopy(found[-1].model).to(torch.bfloat16), "bfloat16"))
    return found


def cheapest(choices: list[Mode], inputs: Any, *, rounds: int) -> tuple[Mode, dict[str, float]]:
    """Time the modes in turn; return the fastest that our `Teacher` can take, and all least CPU times in seconds."""
    taken: dict[str, list[float]] = {mode.name: [] for mode in choices}
    for turn in range(rounds + 1):
        for mode in choices:
            begun = time.process_time()
            mode.answer(inputs)
            if turn:
                taken[mode.name].append(time.process_time() - begun)
    least = {name: min(values) for name, values in taken.items()}
    # inference_mode gives tensors that no loss on features can save for backward, so it is timed but not used
    return min((mode for mode in choices if not mode.inference), key=lambda mode: least[mode.name]), least


def fetch(tensors: dict[str, Tensor]) -> Callable[..., Example]:
    """Return how the teacher's cache reads samples."""

    def read(version: int, rows: Any) -> Example:
        chosen = {name: value[torch.as_tensor(list(rows))] for name, value in tensors.items()}
        inputs, labels = split(as_batch(chosen))
        return Example(inputs=inputs, labels=labels)

    return read


def _images(count: int) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 3, 32, 32)}


def _texts(count: int) -> dict[str, Tensor]:
    lengths = torch.randint(32, 65, (count, 1))
    return {
        "input_ids": torch.randint(30_522, (count, 64)),
        "attention_mask": (torch.arange(64) < lengths).long(),
    }


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def _resnet(depth: int, *, wide: bool = False) -> Callable[[], nn.Module]:
    channels = (32, 64, 128, 256) if wide else (16, 16, 32, 64)
    return lambda: CifarResNet(num_outputs=100, depth=depth, channels=channels)


def _text(depth: int, dim: int, heads: int) -> Callable[[], nn.Module]:
    return lambda: TextEncoder(num_outputs=2, vocab_size=30_522, dim=dim, depth=depth, heads=heads)


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            name="resnet32x4 -> resnet8x4",
            teacher=_resnet(32, wide=True),
            student=_resnet(8, wide=True),
            classes=100,
            data=_images,
            optimizer=_sgd,
            batches=2,
        ),
        Pair(
            name="resnet56 -> resnet20",
            teacher=_resnet(56),
            student=_resnet(20),
            classes=100,
            data=_images,
            optimizer=_sgd,
        ),
        Pair(
            name="text 6x384 -> 3x192",
            teacher=_text(6, 384, 6),
            student=_text(3, 192, 3),
            classes=2,
            data=_texts,
            optimizer=_adamw,
            batch=32,
        ),
        # So small that nothing but the frameworks takes time.
        Pair(
            name="tiny mlp",
            teacher=lambda: MLP(in_features=64, hidden=(128,), num_outputs=10),
            student=lambda: MLP(in_features=64, hidden=(32,), num_outputs=10),
            classes=10,
            data=lambda count: {"x": torch.randn(count, 64)},
            optimizer=_sgd,
            batch=32,
            block=20,
        ),
    )
}
