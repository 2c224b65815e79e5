"""The nine networks that are timed, with random weights, and what goes in."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_opt.forward import Inputs
from lightning_opt.models import GPT, MLP, ConvNet, MobileNet, ResNet, ViT

BERT_BASE = {
    "model_type": "bert",
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network and one batch of inputs.

    Attributes:
        make: Builds it.
        inputs: Draws a batch of this many samples.
        kind: "cnn", "mlp" or "transformer".
        seconds: Share of the timing; large networks take more.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    kind: str
    seconds: float = 1.0


def _minilm() -> nn.Module:
    from lightning_opt.models import minilm_encoder

    return minilm_encoder(num_outputs=2, pretrained=False)


def _bert() -> nn.Module:
    from lightning_opt.models import encoder_classifier

    return encoder_classifier(config=BERT_BASE, num_outputs=2)


def _images(channels: int, side: int) -> Callable[[int], Inputs]:
    return lambda batch: torch.randn(batch, channels, side, side)


def _texts(batch: int) -> Inputs:
    ids = torch.randint(1, 30_000, (batch, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NETWORKS = {
    network.name: network
    for network in (
        Network(
            name="mlp",
            make=lambda: MLP(num_outputs=10, in_features=784, hidden=(2048, 2048)),
            inputs=lambda batch: torch.randn(batch, 784),
            kind="mlp",
            seconds=0.5,
        ),
        Network(
            name="cnn",
            make=lambda: ConvNet(num_outputs=10, widths=(32, 64, 128), convs_per_width=2),
            inputs=_images(1, 28),
            kind="cnn",
            seconds=0.5,
        ),
        Network(name="resnet18", make=lambda: ResNet(num_outputs=1000, depth=18), inputs=_images(3, 160), kind="cnn"),
        Network(
            name="resnet50",
            make=lambda: ResNet(num_outputs=1000, depth=50),
            inputs=_images(3, 160),
            kind="cnn",
            seconds=1.5,
        ),
        Network(name="mobile", make=lambda: MobileNet(num_outputs=1000), inputs=_images(3, 160), kind="cnn"),
        Network(
            name="vit",
            make=lambda: ViT(num_outputs=1000, image_size=160, patch_size=16, dim=384, depth=12, heads=6),
            inputs=_images(3, 160),
            kind="transformer",
            seconds=1.5,
        ),
        Network(name="minilm", make=_minilm, inputs=_texts, kind="transformer"),
        Network(name="bert_base", make=_bert, inputs=_texts, kind="transformer", seconds=3.0),
        Network(
            name="gpt",
            make=lambda: GPT(vocab_size=8192, context_length=TOKENS, dim=256, depth=6, heads=8),
            inputs=lambda batch: torch.randint(8192, (batch, TOKENS)),
            kind="transformer",
        ),
    )
}


def build(network: Network) -> nn.Module:
    """Build a network whose batch norms have seen data, so that their folding is no identity."""
    torch.manual_seed(0)
    model = network.make()
    if network.kind == "cnn":
        model.train()
        with torch.no_grad():
            for _ in range(3):
                model(network.inputs(8))
    return model.eval()
