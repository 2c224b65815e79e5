"""A multi-layer perceptron over flattened inputs."""

from collections.abc import Callable, Sequence
from math import prod

from torch import Tensor, nn

from lightning_opt.models.checks import positive, positives, probability


class MLP(nn.Module):
    """Classify or regress flattened inputs with fully connected layers.

    Weights keep torch's own initialisation (Kaiming uniform).

    Args:
        num_outputs: Values per sample, such as classes.
        in_features: Values per sample that come in; give this or `input_shape`.
        input_shape: Shape of one sample, such as `(1, 28, 28)`; its product is `in_features`.
        hidden: Width of each hidden layer; empty for a linear model.
        dropout: Probability of dropping a hidden value.
        norm: Makes the normalisation layer of a hidden width, such as `torch.nn.BatchNorm1d`; None: no normalisation.

    Raises:
        ValueError: An argument cannot work.

    Example:
        >>> import torch
        >>> MLP(input_shape=(1, 28, 28), hidden=(32,), num_outputs=10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        num_outputs: int,
        in_features: int | None = None,
        input_shape: Sequence[int] | None = None,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if (in_features is None) == (input_shape is None):
            raise ValueError(
                f"give in_features or input_shape, one of them: got in_features={in_features!r}, "
                f"input_shape={input_shape!r}"
            )
        width = prod(positives("input_shape", input_shape)) if input_shape is not None else in_features
        width = positive("in_features", width)  # type: ignore[arg-type]
        probability("dropout", dropout)
        self.layers = nn.ModuleList()
        for size in positives("hidden", hidden) if hidden else ():
            self.layers.append(_hidden_layer(width, size, dropout=dropout, norm=norm))
            width = size
        self.head = nn.Linear(width, positive("num_outputs", num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, ...)` to `(B, num_outputs)`."""
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _hidden_layer(width: int, size: int, *, dropout: float, norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Linear(width, size)]
    if norm is not None:
        parts.append(norm(size))
    parts.append(nn.ReLU())
    if dropout:
        parts.append(nn.Dropout(dropout))
    return nn.Sequential(*parts)
