"""A depthwise-separable network for small devices."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_opt.models.checks import positive, positives, probability
from lightning_opt.models.initialization import init_convolutions

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks, stride of each stage (Sandler et al. 2018, arXiv 1801.04381, table 2)."""


def round_channels(channels: float, *, to: int = 8) -> int:
    """Round a number of channels to a multiple of `to`, at least `to`, and never by more than a tenth downwards.

    Example:
        >>> round_channels(33), round_channels(16 * 0.35)
        (32, 8)
    """
    rounded = max(to, int(channels + to / 2) // to * to)
    return rounded + to if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by itself, narrow by 1x1; add the input where the shape stays."""

    def __init__(self, in_channels: int, channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        widen = [] if expansion == 1 else [_conv(in_channels, inner, kernel=1)]
        self.conv = nn.Sequential(
            *widen,
            _conv(inner, inner, kernel=3, stride=stride, groups=inner),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, channels, H / stride, W / stride)`."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    """Classify images with inverted residuals (Sandler et al. 2018, arXiv 1801.04381).

    The defaults are the published network, with the published checkpoints' parameter names. Convolutions: Kaiming
    normal over fan-out; the linear layer: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        in_channels: Channels of the image.
        width: Factor on all channels, which are rounded to multiples of 8.
        stages: `(expansion, channels, blocks, stride)` of each stage.
        stem_channels: Channels of the first convolution, before the factor.
        stem_stride: Stride of the first convolution; 1 for images below about 64 pixels.
        last_channels: Channels before the head; the factor acts on it only when above 1, as published.
        dropout: Probability of dropping a value before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        in_channels: int = 3,
        width: float = 1.0,
        stages: Sequence[Sequence[int]] = STAGES,
        stem_channels: int = 32,
        stem_stride: int = 2,
        last_channels: int = 1280,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width <= 0:
            raise ValueError(f"width must be above 0, got {width}")
        channels = round_channels(positive("stem_channels", stem_channels) * width)
        layers: list[nn.Module] = [
            _conv(positive("in_channels", in_channels), channels, kernel=3, stride=positive("stem_stride", stem_stride))
        ]
        for i, stage in enumerate(stages):
            expansion, base, blocks, stride = positives(f"stages[{i}]", stage, length=4)
            wide = round_channels(base * width)
            for n in range(blocks):
                layers.append(InvertedResidual(channels, wide, expansion=expansion, stride=1 if n else stride))
                channels = wide
        last = round_channels(positive("last_channels", last_channels) * max(1.0, width))
        self.features = nn.Sequential(*layers, _conv(channels, last, kernel=1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Dropout(probability("dropout", dropout)), nn.Linear(last, positive("num_outputs", num_outputs))
        )
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, num_outputs)`."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


def _conv(in_channels: int, channels: int, *, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
    )
