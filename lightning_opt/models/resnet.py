"""Residual networks for large images, with the parameter names of the commonly published checkpoints."""

from torch import Tensor, nn

from lightning_opt.models.checks import one_of, positive, probability
from lightning_opt.models.initialization import init_convolutions
from lightning_opt.models.resnet_cifar import BasicBlock, shortcut

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
"""Blocks of each stage by depth (He et al. 2015, arXiv 1512.03385, table 1)."""


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 around a shortcut; the 3x3 carries the stride, as in the published checkpoints."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride=stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, channels, H / stride, W / stride)`."""
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.relu3(self.bn3(self.conv3(x)) + identity)


class ResNet(nn.Module):
    """Classify images with a residual network of four stages (He et al. 2015, arXiv 1512.03385, table 1).

    Convolutions: Kaiming normal over fan-out; the linear layer: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        depth: 18 or 34 (basic blocks), 50 or 101 (bottlenecks).
        in_channels: Channels of the image.
        small_images: Replace the 7x7 convolution of stride 2 and the pooling behind it, which shrink an image by four,
            by one 3x3 convolution of stride 1. For images below about 64 pixels.
        dropout: Probability of dropping a value before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        depth: int = 18,
        in_channels: int = 3,
        small_images: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        one_of("depth", depth, tuple(BLOCKS))
        block, expansion = (BasicBlock, 1) if depth < 50 else (Bottleneck, 4)
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(
            positive("in_channels", in_channels), 64, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        widths = [64, *(width * expansion for width in (64, 128, 256, 512))]
        blocks = BLOCKS[depth]
        self.layer1 = _stage(block, widths[0], widths[1], blocks=blocks[0], stride=1)
        self.layer2 = _stage(block, widths[1], widths[2], blocks=blocks[1], stride=2)
        self.layer3 = _stage(block, widths[2], widths[3], blocks=blocks[2], stride=2)
        self.layer4 = _stage(block, widths[3], widths[4], blocks=blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.fc = nn.Linear(widths[-1], positive("num_outputs", num_outputs))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, num_outputs)`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, *, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, channels, stride=stride)
    return nn.Sequential(first, *(block(channels, channels, stride=1) for _ in range(blocks - 1)))
