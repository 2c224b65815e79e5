"""The two networks whose training steps are timed, on random data: time does not depend on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt.models import ResNet


@dataclass(frozen=True, kw_only=True)
class Net:
    """A network, its batch and its usual optimizer."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    classes: int

    def batch(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        inputs = self.inputs()
        return inputs, torch.randint(self.classes, (len(inputs),))


class Tiny(nn.Sequential):
    """So small that nothing but the frameworks takes time."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Bert(nn.Module):
    """A BERT classifier that takes token ids alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(num_hidden_layers=3, num_labels=2, vocab_size=30_522, attn_implementation="sdpa")
        self.net = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids).logits


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of linear and convolution layers."""
    kinds = (nn.Linear, nn.Conv2d)
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


NETS = {
    net.name: net
    for net in (
        Net(
            name="ResNet-50, 8x96x96",
            make=lambda: ResNet(num_outputs=1000, depth=50),
            inputs=lambda: torch.randn(8, 3, 96, 96),
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4),
            classes=1000,
        ),
        Net(
            name="BERT 3 layers, 8x64",
            make=Bert,
            inputs=lambda: torch.randint(30_522, (8, 64)),
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5),
            classes=2,
        ),
        Net(
            name="tiny mlp",
            make=Tiny,
            inputs=lambda: torch.randn(32, 64),
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
            classes=10,
        ),
    )
}
