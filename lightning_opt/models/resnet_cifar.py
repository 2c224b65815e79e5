"""Residual networks for 32x32 images, as the distillation literature uses them.

Shapes and parameter names are those of the benchmark of Tian et al. 2019 (arXiv 1910.10699), so that its published
checkpoints load.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_opt.models.checks import positive, positives, probability
from lightning_opt.models.initialization import init_convolutions


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the sum goes through a ReLU (He et al. 2015, arXiv 1512.03385, figure 5)."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride=stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, channels, H / stride, W / stride)`."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + identity)


def shortcut(in_channels: int, channels: int, *, stride: int) -> nn.Sequential | None:
    """Make the 1x1 projection of a shortcut whose shape changes; None where it does not."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels))


class CifarResNet(nn.Module):
    """Classify small images with three stages of basic blocks (He et al. 2015, arXiv 1512.03385, section 4.2).

    Shortcuts that change shape are 1x1 convolutions. resnet20, 32, 44, 56 and 110 use channels `(16, 16, 32, 64)`;
    resnet8x4 and resnet32x4 use depth 8 and 32 with `(32, 64, 128, 256)`. Convolutions: Kaiming normal over fan-out;
    the linear layer: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        depth: Weighted layers, `6 n + 2` for n blocks a stage.
        channels: Channels of the stem and of the three stages.
        in_channels: Channels of the image.
        dropout: Probability of dropping a value before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        depth: int = 20,
        channels: Sequence[int] = (16, 16, 32, 64),
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if positive("depth", depth) < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, such as 8, 20, 32, 56 or 110, got {depth}")
        stem, *stages = positives("channels", channels, length=4)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(positive("in_channels", in_channels), stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, stages[0], blocks=blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks=blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks=blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.fc = nn.Linear(stages[2], positive("num_outputs", num_outputs))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, num_outputs)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def _stage(in_channels: int, channels: int, *, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride=stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)))


class PreActivationBlock(nn.Module):
    """Normalise, activate, convolve, twice, around a shortcut (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # The published checkpoints' own spelling.
        self.convShortcut = (
            None
            if in_channels == channels and stride == 1
            else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, channels, H / stride, W / stride)`."""
        activated = self.relu1(self.bn1(x))
        identity = x if self.convShortcut is None else self.convShortcut(activated)
        hidden = self.relu2(self.bn2(self.conv1(activated)))
        return identity + self.conv2(self.dropout(hidden))


class WideResNet(nn.Module):
    """Classify small images with a wide residual network (Zagoruyko and Komodakis 2016, arXiv 1605.07146, table 1).

    Convolutions: Kaiming normal over fan-out; the linear layer: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        depth: Weighted layers, `6 n + 4` for n blocks a stage.
        widen: Factor on the stages' channels `(16, 32, 64)`.
        in_channels: Channels of the image.
        dropout: Probability of dropping a value inside each block.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self, *, num_outputs: int, depth: int = 16, widen: int = 2, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if positive("depth", depth) < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, such as 10, 16, 28 or 40, got {depth}")
        probability("dropout", dropout)
        blocks = (depth - 4) // 6
        widths = [16, *(width * positive("widen", widen) for width in (16, 32, 64))]
        self.conv1 = nn.Conv2d(positive("in_channels", in_channels), 16, 3, padding=1, bias=False)
        self.block1 = _wide_stage(widths[0], widths[1], blocks=blocks, stride=1, dropout=dropout)
        self.block2 = _wide_stage(widths[1], widths[2], blocks=blocks, stride=2, dropout=dropout)
        self.block3 = _wide_stage(widths[2], widths[3], blocks=blocks, stride=2, dropout=dropout)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], positive("num_outputs", num_outputs))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, num_outputs)`."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(self.avgpool(x).flatten(1))


def _wide_stage(in_channels: int, channels: int, *, blocks: int, stride: int, dropout: float) -> nn.Sequential:
    first = PreActivationBlock(in_channels, channels, stride=stride, dropout=dropout)
    rest = (PreActivationBlock(channels, channels, stride=1, dropout=dropout) for _ in range(blocks - 1))
    # "layer" is part of the published checkpoints' names.
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))
