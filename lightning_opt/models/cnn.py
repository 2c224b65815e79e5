"""Small convolutional networks for images and for one-dimensional signals."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_opt.models.checks import positive, positives, probability
from lightning_opt.models.initialization import init_convolutions


class ConvNet(nn.Module):
    """Classify or regress images with 3x3 convolutions, halving the image between widths.

    Each width is a stage of `convs_per_width` times convolution, batch normalisation, ReLU; then the mean over the
    image and one linear layer. Convolutions: Kaiming normal over fan-out; the linear layer: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        in_channels: Channels of the image.
        widths: Channels of each stage; n stages need images of at least `2 ** (n - 1)` pixels a side.
        convs_per_width: Convolutions in each stage.
        dropout: Probability of dropping a value before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64, 128),
        convs_per_width: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = positives("widths", widths)
        channels = positive("in_channels", in_channels)
        self.stages = nn.ModuleList()
        for i, width in enumerate(widths):
            parts: list[nn.Module] = [nn.MaxPool2d(2)] if i else []
            for _ in range(positive("convs_per_width", convs_per_width)):
                parts.append(_conv_2d(channels, width))
                channels = width
            self.stages.append(nn.Sequential(*parts))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.head = nn.Linear(channels, positive("num_outputs", num_outputs))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, num_outputs)`."""
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(self.pool(x).flatten(1)))


class LeNet(nn.Module):
    """Classify or regress small images of one size: convolutions, then linear layers that see where things are.

    After LeCun et al. (1998), with 3x3 convolutions, batch normalisation and ReLU. Convolutions: Kaiming normal over
    fan-out; linear layers: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        image_size: Pixels a side.
        in_channels: Channels of the image.
        widths: Channels of each convolution.
        stride: Of each convolution; with 1 the image is halved by max pooling between convolutions, with 2 by them.
        hidden: Width of a linear layer before the head; None: no such layer.
        dropout: Probability of dropping a value before each linear layer.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        image_size: int = 28,
        in_channels: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        stride: int = 1,
        hidden: int | None = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        side, channels = positive("image_size", image_size), positive("in_channels", in_channels)
        self.stages = nn.ModuleList()
        for i, width in enumerate(positives("widths", widths)):
            pools: list[nn.Module] = [nn.MaxPool2d(2)] if i and stride == 1 else []
            self.stages.append(nn.Sequential(*pools, _conv_2d(channels, width, stride=stride)))
            channels = width
            side = (side + 1) // 2 if stride == 2 else side // 2 if i else side
        if side < 1:
            raise ValueError(f"image_size {image_size} is too small for {len(widths)} convolutions")
        features = channels * side * side
        self.hidden = nn.Sequential() if hidden is None else _hidden(features, positive("hidden", hidden), dropout)
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.head = nn.Linear(features if hidden is None else hidden, positive("num_outputs", num_outputs))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, image_size, image_size)` to `(B, num_outputs)`."""
        for stage in self.stages:
            x = stage(x)
        return self.head(self.dropout(self.hidden(x.flatten(1))))


class ConvNet1d(nn.Module):
    """Classify or regress signals with strided one-dimensional convolutions.

    Each width is one convolution of stride 2 with batch normalisation and ReLU. With `length` the last feature map is
    flattened, so that the head sees where something happened; without it the mean over time is taken.
    Convolutions: Kaiming normal over fan-out; the linear layer: torch's own.

    Args:
        num_outputs: Values per sample, such as classes.
        in_channels: Channels of the signal.
        widths: Channels of each layer.
        kernel_size: Odd width of each convolution.
        length: Samples in a signal; None: any length, mean over time.
        dropout: Probability of dropping a value before the head.

    Raises:
        ValueError: An argument cannot work.
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64, 64),
        kernel_size: int = 5,
        length: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if positive("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        channels = positive("in_channels", in_channels)
        self.layers = nn.ModuleList()
        for width in positives("widths", widths):
            self.layers.append(_conv_1d(channels, width, kernel_size=kernel_size))
            channels = width
        self.pool = nn.AdaptiveAvgPool1d(1) if length is None else nn.Identity()
        steps = 1 if length is None else _steps_left(positive("length", length), len(widths))
        self.dropout = nn.Dropout(probability("dropout", dropout))
        self.head = nn.Linear(channels * steps, positive("num_outputs", num_outputs))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L)` or `(B, in_channels, L)` to `(B, num_outputs)`."""
        if x.dim() == 2:
            x = x.unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(self.pool(x).flatten(1)))


def _steps_left(length: int, layers: int) -> int:
    for _ in range(layers):
        length = (length + 1) // 2  # an odd kernel, padded by half of it, at stride 2
    return length


def _hidden(features: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, width), nn.ReLU())


def _conv_2d(channels: int, width: int, *, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(width), relu=nn.ReLU()))


def _conv_1d(channels: int, width: int, *, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, width, kernel_size, stride=2, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm1d(width), relu=nn.ReLU()))
