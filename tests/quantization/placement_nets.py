"""Small networks with the habits that placement has to follow."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class SharedReLU(nn.Module):
    """A residual block as it is often written: one ReLU that works in place, and `out += identity`."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    """A stem and two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(SharedReLU(), SharedReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(functional.relu(self.stem(x))).mean((2, 3)))


class Functional(nn.Module):
    """Everything but layers is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.silu(self.conv2(x))
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1)
        x = functional.dropout(functional.relu(self.fc1(x)), 0.5, self.training)
        return self.fc2(x)


class Fire(nn.Module):
    """Two branches that are concatenated, as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(3, 4, 1)
        self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze(x))
        both = torch.cat([functional.relu(self.one(x)), functional.relu(self.three(x))], 1)
        return self.last(both)


class Gate(nn.Module):
    """A squeeze-and-excite block with a hard swish before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.Hardswish()
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        scale = functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))
        return self.last(x * functional.hardsigmoid(self.up(scale)))


class PostNorm(nn.Module):
    """A layer norm whose output is read by two linear layers and by the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.inner(x)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.gelu(self.a(x)) * self.b(x))


class Levels(nn.Module):
    """A head that is called on two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.relu(self.one(x))
        b = self.relu(self.two(a))
        return self.head(a), self.head(b)


class StatementInPlace(nn.Module):
    """A sum in place whose result is not used: whoever reads the tensor later reads what was not caught."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.three, self.four = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.two(x)
        a.add_(b)
        return self.three(a) + self.four(a)


class TrainingBranch(nn.Module):
    """Leaves a layer out in training."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.one(x))
        return x if self.training else self.two(x)


class SequentialAtTheTop(nn.Sequential):
    """A shared activation right in a sequential."""

    def __init__(self) -> None:
        relu = nn.ReLU()
        super().__init__(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(64, 2))


class Unused(nn.Module):
    """Has a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Products(nn.Module):
    """Products that are read twice, of layers and modules whose own rounding multiplies as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x) * self.b(x)
        second = self.c(first) * self.d(first)
        return self.c(second) + second


class Positions(nn.Module):
    """Looks tokens up in a table and adds the table's first rows as positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x) + self.table.weight[: x.shape[1]])
