"""The four networks whose training steps are timed, on random data: time does not depend on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.models import GPT, ConvNet, ResNet, TextEncoder

VOCABULARY = 1000


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network, its batch and its optimizer."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    classes: int
    per_token: bool = False
    text: bool = False

    def batch(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        inputs = self.inputs()
        return inputs, torch.randint(self.classes, inputs.shape if self.per_token else inputs.shape[:1])

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train()

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-5)


def loss_of(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


NETS = {
    net.name: net
    for net in (
        Net(
            name="resnet18, 8x32x32",
            make=lambda: ResNet(num_outputs=10, depth=18, small_images=True),
            inputs=lambda: torch.randn(8, 3, 32, 32),
            classes=10,
        ),
        Net(
            name="cnn, 32x28x28",
            make=lambda: ConvNet(num_outputs=10, widths=(32, 64, 128), convs_per_width=2),
            inputs=lambda: torch.randn(32, 1, 28, 28),
            classes=10,
        ),
        Net(
            name="text encoder, 16x64",
            make=lambda: TextEncoder(num_outputs=2, vocab_size=VOCABULARY, dim=256, depth=4, dropout=0.1),
            inputs=lambda: torch.randint(VOCABULARY, (16, 64)),
            classes=2,
            text=True,
        ),
        Net(
            name="gpt, 8x128",
            make=lambda: GPT(vocab_size=VOCABULARY, context_length=128, dim=256, depth=4),
            inputs=lambda: torch.randint(VOCABULARY, (8, 128)),
            classes=VOCABULARY,
            per_token=True,
            text=True,
        ),
    )
}
