"""The models of the study: small versions of known designs, in plain torch and from Hugging Face configurations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_opt import models
from lightning_opt.forward import Inputs


@dataclass(frozen=True)
class Architecture:
    """A way to build a model with fresh random weights, and inputs that fit it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def images(channels: int = 3, size: int = 32, batch: int = 2) -> Callable[[], Tensor]:
    return lambda: torch.randn(batch, channels, size, size)


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(inner)))], 1)


class DenseNet(nn.Module):
    """Layers that each add channels to all that came before (Huang et al. 2017)."""

    def __init__(self, growth: int = 8, blocks: tuple[int, ...] = (3, 3)) -> None:
        super().__init__()
        channels = 2 * growth
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for layers in blocks:
            for _ in range(layers):
                parts.append(DenseLayer(channels, growth))
                channels += growth
            parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        self.features, self.classifier = nn.Sequential(*parts), nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
            *(nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half)),
            *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        x = torch.cat([first, self.branch(second)], 1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleNetV2(nn.Module):
    """Units that halve the channels and shuffle them (Ma et al. 2018)."""

    def __init__(self, channels: int = 32, units: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.units = nn.Sequential(*(ShuffleUnit(channels) for _ in range(units)))
        self.last, self.head = nn.Conv2d(channels, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(self.units(self.stem(x)))).mean((2, 3)))


class ShuffleGroupUnit(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.shuffle = nn.ChannelShuffle(groups)
        self.middle = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.last = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(torch.relu(self.norms[0](self.first(x))))
        return torch.relu(x + self.norms[2](self.last(self.norms[1](self.middle(y)))))


class ShuffleNetV1(nn.Module):
    """Grouped 1x1 convolutions with a shuffle between them (Zhang et al. 2018)."""

    def __init__(self, channels: int = 36, groups: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.units = nn.Sequential(*(ShuffleGroupUnit(channels, groups) for _ in range(2)))
        self.last, self.head = nn.Conv2d(channels, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.last(self.units(self.stem(x)))).mean((2, 3)))


class ResNeXtBlock(nn.Module):
    def __init__(self, channels: int, inner: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False)
        self.bn2, self.conv3, self.bn3 = nn.BatchNorm2d(inner), nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return torch.relu(x + self.bn3(self.conv3(y)))


class ResNeXt(nn.Module):
    """Grouped convolutions with several channels per group (Xie et al. 2017)."""

    def __init__(self, channels: int = 32, groups: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ResNeXtBlock(channels, 64, groups) for _ in range(2)))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class MBConv(nn.Module):
    def __init__(self, channels: int, out: int, expansion: int = 4) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2, self.attend = nn.BatchNorm2d(inner), SqueezeExcite(inner, channels // 2)
        self.project, self.bn3 = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        self.residual = channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn2(self.depthwise(F.silu(self.bn1(self.expand(x))))))
        y = self.bn3(self.project(self.attend(y)))
        return x + y if self.residual else y


class EfficientNet(nn.Module):
    """Inverted residuals with squeeze and excitation (Tan and Le 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.blocks = nn.Sequential(MBConv(16, 16), MBConv(16, 24), MBConv(24, 24))
        self.last, self.head = nn.Conv2d(24, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.last(self.blocks(self.stem(x)))).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.narrow(F.gelu(self.widen(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Depthwise 7x7, layer norm and a wide pair of linear layers with layer scale (Liu et al. 2022)."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim) for _ in range(2)))
        self.down, self.more = nn.Conv2d(dim, 2 * dim, 2, stride=2), ConvNeXtBlock(2 * dim)
        self.norm, self.head = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.more(self.down(self.blocks(self.stem(x)))).mean((-2, -1))))


class DoubleConv(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__(
            *(nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU()),
            *(nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU()),
        )


class UNet(nn.Module):
    """Down and up again with skips that are concatenated (Ronneberger et al. 2015); group norm."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = DoubleConv(3, channels), DoubleConv(channels, 2 * channels)
        self.bottom = DoubleConv(2 * channels, 4 * channels)
        self.up2 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.join2 = DoubleConv(4 * channels, 2 * channels)
        self.reduce, self.join1 = nn.Conv2d(2 * channels, channels, 1), DoubleConv(2 * channels, channels)
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.up2(self.bottom(F.max_pool2d(second, 2)))
        y = self.join2(torch.cat([second, y], 1))
        y = self.reduce(F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False))
        return self.head(self.join1(torch.cat([y, first], 1)))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Linear(24, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Linear layers over tokens and over channels in turn (Tolstikhin et al. 2021)."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 8, stride=8)
        self.blocks = nn.Sequential(*(MixerBlock(16, dim) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


class WindowAttention(nn.Module):
    """Attention within windows with a table of relative positions (Liu et al. 2021), by einsum."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, (dim // heads) ** -0.5
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        distance = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("places", distance[0] * (2 * window - 1) + distance[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(windows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhid,bhjd->bhij", q * self.scale, k)
        scores = scores + self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        return self.project(torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2))


class SwinBlock(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, window)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        size, rows, columns = self.window, height // self.window, width // self.window
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(batch, rows, size, columns, size, dim).transpose(2, 3).reshape(-1, size * size, dim)
        y = self.attention(y).view(batch, rows, columns, size, size, dim).transpose(2, 3)
        x = x + torch.roll(y.reshape(batch, height, width, dim), (self.shift, self.shift), (1, 2))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Shifted windows and merging of patches by strided slices (Liu et al. 2021)."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.first = nn.Sequential(SwinBlock(dim, 2, 4, 0), SwinBlock(dim, 2, 4, 2))
        self.norm, self.merge = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)
        self.second, self.last, self.head = SwinBlock(2 * dim, 4, 4, 0), nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.head(self.last(self.second(self.merge(self.norm(x)))).mean((1, 2)))


class SuperResolution(nn.Module):
    """Residual blocks and a pixel shuffle (Shi et al. 2016, Lim et al. 2017)."""

    def __init__(self, channels: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.PReLU(channels),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.widen, self.shuffle = nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2)
        self.head = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.relu(self.shuffle(self.widen(x))))


class Volume(nn.Module):
    """Convolutions over three axes with instance norm, as in volumes and video."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv3d(2, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU()),
            *(nn.Conv3d(8, 16, 3, stride=2, padding=1), nn.BatchNorm3d(16), nn.ELU()),
            *(nn.ConvTranspose3d(16, 8, 2, stride=2), nn.ReLU()),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3, 4)))


class WaveNet(nn.Module):
    """Gated dilated convolutions over time with residual and skip sums (van den Oord et al. 2016)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, channels, 1)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 3, padding=2**i, dilation=2**i) for i in range(3))
        self.outs = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 1) for _ in range(3))
        self.head = nn.Conv1d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), 0.0
        for gate, out in zip(self.gates, self.outs, strict=True):
            a, b = gate(x).chunk(2, 1)
            residual, skip = out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.head(torch.relu(skips))


class TorchTransformer(nn.Module):
    """torch's own encoder, whose attention takes the width of a head from its input."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 4, 64, batch_first=True, activation="gelu")
        self.stem, self.encoder = nn.Linear(8, dim), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)).mean(1))


class LSTMTagger(nn.Module):
    """A bidirectional LSTM in two layers over embedded words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(50, 24), nn.Linear(24, 20)
        self.lstm = nn.LSTM(20, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(torch.relu(self.inner(self.embedding(ids))))[0])


def hugging_face(kind: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    """Return a builder of a Hugging Face model with a tiny configuration and random weights."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**values))

    return build


def words(vocabulary: int = 60, length: int = 9, **more: Any) -> Callable[[], dict[str, Tensor]]:
    def make() -> dict[str, Tensor]:
        ids = torch.randint(5, vocabulary, (2, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | {
            name: torch.randint(5, vocabulary, (2, size)) for name, size in more.items()
        }

    return make


_BERT = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"vocab_size": 60, "max_position_embeddings": 40},
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EAGER = {"attn_implementation": "eager"}

PLAIN: dict[str, Architecture] = {
    "mlp": Architecture(lambda: models.MLP(in_features=20, num_outputs=10), lambda: torch.randn(2, 20)),
    "cnn": Architecture(lambda: models.ConvNet(num_outputs=10), images(1, 28)),
    "resnet18": Architecture(lambda: models.ResNet(num_outputs=10, depth=18), images(3, 64)),
    "resnet50": Architecture(lambda: models.ResNet(num_outputs=10, depth=50), images(3, 64)),
    "cifar_resnet20": Architecture(lambda: models.CifarResNet(num_outputs=10, depth=20), images()),
    "wide_resnet16": Architecture(lambda: models.WideResNet(num_outputs=10, depth=16), images()),
    "densenet": Architecture(DenseNet, images()),
    "shufflenet_v2": Architecture(ShuffleNetV2, images()),
    "shufflenet_v1": Architecture(ShuffleNetV1, images()),
    "resnext": Architecture(ResNeXt, images()),
    "mobilenet_v2": Architecture(lambda: models.MobileNet(num_outputs=10, width=0.5), images(3, 64)),
    "efficientnet": Architecture(EfficientNet, images()),
    "convnext": Architecture(ConvNeXt, images()),
    "unet": Architecture(UNet, images()),
    "super_resolution": Architecture(SuperResolution, images(3, 12)),
    "volume3d": Architecture(Volume, lambda: torch.randn(2, 2, 8, 8, 8)),
    "wavenet": Architecture(WaveNet, lambda: torch.randn(2, 1, 24)),
    "vit": Architecture(lambda: models.ViT(num_outputs=10, image_size=28, depth=2), images(3, 28)),
    "vit_fused_qkv": Architecture(
        lambda: models.ViT(num_outputs=10, image_size=28, depth=2, fused_qkv=True), images(3, 28)
    ),
    "swin": Architecture(Swin, images()),
    "mixer": Architecture(Mixer, images()),
    "gpt": Architecture(
        lambda: models.GPT(vocab_size=60, context_length=16, dim=32, depth=2), lambda: torch.randint(0, 60, (2, 16))
    ),
    "torch_transformer": Architecture(TorchTransformer, lambda: torch.randn(2, 6, 8)),
    "gru": Architecture(
        lambda: models.GRUClassifier(num_outputs=10, in_features=3, hidden=24), lambda: torch.randn(2, 12, 3)
    ),
    "lstm": Architecture(LSTMTagger, lambda: torch.randint(0, 50, (2, 7))),
}

HUGGING_FACE: dict[str, Architecture] = {
    "bert": Architecture(hugging_face("BertForSequenceClassification", "BertConfig", **_BERT), words()),
    "bert_eager": Architecture(hugging_face("BertForSequenceClassification", "BertConfig", **_BERT, **_EAGER), words()),
    "distilbert": Architecture(
        hugging_face(
            *("DistilBertForSequenceClassification", "DistilBertConfig"),
            **{
                "dim": 32,
                "n_layers": 2,
                "n_heads": 4,
                "hidden_dim": 64,
                "vocab_size": 60,
                "max_position_embeddings": 40,
            },
        ),
        words(),
    ),
    "roberta": Architecture(hugging_face("RobertaForMaskedLM", "RobertaConfig", **_BERT), words()),
    "albert": Architecture(
        hugging_face("AlbertForSequenceClassification", "AlbertConfig", **_BERT, embedding_size=16), words()
    ),
    "deberta_v2": Architecture(
        hugging_face(
            *("DebertaV2ForSequenceClassification", "DebertaV2Config"),
            **{**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        ),
        words(),
    ),
    "electra": Architecture(
        hugging_face("ElectraForSequenceClassification", "ElectraConfig", **_BERT, embedding_size=16), words()
    ),
    "gpt2": Architecture(
        hugging_face("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=40),
        words(),
    ),
    "gpt2_eager": Architecture(
        hugging_face(
            *("GPT2LMHeadModel", "GPT2Config"),
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 40, **_EAGER},
        ),
        words(),
    ),
    "gpt_neox": Architecture(hugging_face("GPTNeoXForCausalLM", "GPTNeoXConfig", **_BERT, rotary_pct=0.5), words()),
    "opt": Architecture(
        hugging_face(
            *("OPTForCausalLM", "OPTConfig"),
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 60},
            **{"max_position_embeddings": 40, "word_embed_proj_dim": 32, "pad_token_id": 1},
        ),
        words(),
    ),
    "t5": Architecture(
        hugging_face(
            *("T5ForConditionalGeneration", "T5Config"),
            **{"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64, "vocab_size": 60},
        ),
        words(decoder_input_ids=5),
    ),
    "llama_gqa": Architecture(hugging_face("LlamaForCausalLM", "LlamaConfig", **_LLAMA), words()),
    "llama_gqa_eager": Architecture(hugging_face("LlamaForCausalLM", "LlamaConfig", **_LLAMA, **_EAGER), words()),
    "llama_mha": Architecture(
        hugging_face("LlamaForCausalLM", "LlamaConfig", **{**_LLAMA, "num_key_value_heads": 4}), words()
    ),
    "mistral": Architecture(hugging_face("MistralForCausalLM", "MistralConfig", **_LLAMA, head_dim=8), words()),
    "qwen2": Architecture(hugging_face("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA), words()),
    "qwen3": Architecture(hugging_face("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=8), words()),
    "gemma": Architecture(hugging_face("GemmaForCausalLM", "GemmaConfig", **_LLAMA, head_dim=8), words()),
    "phi": Architecture(hugging_face("PhiForCausalLM", "PhiConfig", **_LLAMA), words()),
    "vit_hf": Architecture(
        hugging_face(
            *("ViTForImageClassification", "ViTConfig"),
            **{**_BERT, "image_size": 32, "patch_size": 8, "num_labels": 10},
        ),
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "whisper_encoder": Architecture(
        lambda: hugging_face("WhisperModel", "WhisperConfig", **_WHISPER)().encoder,
        lambda: {"input_features": torch.randn(2, 8, 40)},
    ),
    "bart": Architecture(
        hugging_face(
            *("BartForConditionalGeneration", "BartConfig"),
            **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
            **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 60},
            **{"max_position_embeddings": 40},
        ),
        words(decoder_input_ids=5),
    ),
}

_WHISPER = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 60},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8},
    **{"max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "decoder_start_token_id": 1},
}

ARCHITECTURES = {**PLAIN, **HUGGING_FACE}


def randomise(model: nn.Module, *, seed: int) -> None:
    """Give every parameter and running statistic a lively value: no flat attention, no norm at one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.numel() / max(len(parameter) if parameter.dim() else 1, 1)
            parameter.copy_(noise / fan_in**0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
        for name, buffer in model.named_buffers():
            if "running" in name:
                noise = torch.rand(buffer.shape, generator=generator)
                buffer.copy_(0.5 + noise if "var" in name else 0.4 * (noise - 0.5))
