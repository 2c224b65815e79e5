"""AdaRound: learn for each weight of a layer whether to round it up or down."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs
from lightning_opt.quantization.improvement import Outcome, QuantizedImprovement
from lightning_opt.quantization.layerwise import Stage, paired_inputs_of, stages
from lightning_opt.quantization.rounding import Lattice
from lightning_opt.quantization.targets import Target, outcome, switched_off, targets_in

_ZETA, _GAMMA = 1.1, -0.1  # equation 23: the sigmoid is stretched, so that 0 and 1 are reached


@dataclass(frozen=True)
class Products:
    """Sums over calibration rows that say how well a layer's new weights imitate its old ones.

    The squared error of weights V on what the quantized model feeds them, against weights W on what the float model
    feeds them, is `V (X'^T X') V^T - 2 V (X'^T X) W^T + W (X^T X) W^T`: nothing else of the data is needed.

    Attributes:
        gram: `X'^T X'` of the quantized model's inputs, `(G, I, I)`.
        cross: `X'^T X`, quantized with float, `(G, I, I)`.
        reference: `X^T X` of the float model's inputs, `(G, I, I)`.
        rows: Number of rows.
    """

    gram: Tensor
    cross: Tensor
    reference: Tensor
    rows: int

    @classmethod
    def of(cls, quantized: Tensor, reference: Tensor) -> "Products":
        """Sum over rows that belong together, both `(G, rows, I)`."""
        products = (quantized.mT @ quantized, quantized.mT @ reference, reference.mT @ reference)
        gram, cross, own = (product.double() for product in products)
        return cls(gram, cross, own, quantized.shape[1])

    def __add__(self, other: "Products") -> "Products":
        return Products(
            self.gram + other.gram,
            self.cross + other.cross,
            self.reference + other.reference,
            self.rows + other.rows,
        )

    def error(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the squared error of each output, `(G, O)` float64, of `(G, O, I)` weights."""
        new, old = new.double(), old.double()
        linear, fixed = old @ self.cross.mT, ((old @ self.reference) * old).sum(-1)
        return ((new @ self.gram - 2.0 * linear) * new).sum(-1).add(fixed).clamp(min=0.0)

    def slope(self, old: Tensor) -> Tensor:
        """Return half the gradient of the error at the old weights, `(G, O, I)` float64."""
        return old.double() @ self.gram - old.double() @ self.cross.mT


def learn_rounding(
    weight: Tensor,
    products: Products,
    lattice: Lattice,
    *,
    steps: int = 300,
    learning_rate: float = 0.03,
    strength: float = 0.01,
    beta: tuple[float, float] = (20.0, 2.0),
    warmup: float = 0.2,
) -> Tensor:
    """Choose for each weight the level below or above it, so that the layer's outputs change least.

    Nagel, Amjad, van Baalen, Louizos, Blankevoort (2020), "Up or Down? Adaptive Rounding for Post-Training
    Quantization", arXiv 2004.10568: the relaxation of equation 21 with the rectified sigmoid of equation 23 and the
    regularizer of equation 24, whose exponent falls from `beta[0]` to `beta[1]` after a warmup without it, and the
    reconstruction of equation 25, from the quantized model's inputs, without the activation function. Two things are
    done otherwise. The error is summed over all calibration rows at once (see `Products`), so a step costs one product
    of the weights and nothing is drawn; and it is measured in units of the error of rounding to the nearest level, so
    that one strength and one learning rate fit every layer. An output for which rounding to nearest is better keeps it.
    Weights that are exactly 0, as pruning leaves them, stay 0.

    Args:
        weight: `(G, O, I)`; not changed.
        products: What the calibration data say.
        lattice: Where weights may lie.
        steps: Steps of Adam.
        learning_rate: Of Adam.
        strength: Weight of the regularizer.
        beta: First and last exponent of the regularizer.
        warmup: Share of the steps without the regularizer.

    Returns:
        The weights on the lattice, `(G, O, I)` float32.
    """
    weight = weight.detach().float()
    scale, zero_point = lattice.columns(weight.shape[-1])
    below = torch.floor(weight * scale.reciprocal())
    lowest, highest = lattice.qmin - zero_point, lattice.qmax - zero_point
    nearest = lattice.nearest(weight)
    error = products.error(nearest, weight)
    unit = error.sum().clamp(min=torch.finfo(torch.float32).tiny)
    gram, slope = (products.gram / unit).float(), (products.slope(weight) / unit).float()
    logits = _start(weight * scale.reciprocal() - below).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    for step in range(steps):
        with torch.enable_grad():
            share = _share(logits)
            new = torch.clamp(below + share, lowest, highest) * scale
            undecided = strength * _undecided(share, _exponent(step / steps, beta, warmup))
        by_error = 2.0 * ((new.detach() - weight) @ gram + slope)  # by hand, which is one product instead of three
        parts, grads = ([new, undecided], [by_error, None]) if step >= warmup * steps else ([new], [by_error])
        (logits.grad,) = torch.autograd.grad(parts, [logits], grads)
        optimizer.step()
    up = (_share(logits.detach()) >= 0.5).float()
    learned = torch.clamp(below + up, lowest, highest) * scale * (weight != 0)
    better = products.error(learned, weight) < error
    return torch.where(better[..., None], learned, nearest)


@dataclass(frozen=True, kw_only=True)
class AdaRound(QuantizedImprovement):
    """Learn up or down for the weights of layer after layer with `learn_rounding`.

    Nagel et al. (2020), arXiv 2004.10568. Each layer is to answer, on what the layers before it give after their own
    rounding, as the float model's layer answers on the float model's values. For linear layers, convolutions (as the
    product with unfolded inputs that they are) and transformers' `Conv1D`.

    Args:
        steps: Steps of Adam for each layer.
        learning_rate: Of Adam.
        strength: Weight of the regularizer.
        exclude: Patterns (`fnmatch`) of full names of layers to leave alone.

    Raises:
        ValueError: An argument is out of range.
    """

    steps: int = 300
    learning_rate: float = 0.03
    strength: float = 0.01
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        for name in ("learning_rate", "strength"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)}")

    @torch.no_grad()
    def improve(self, model: nn.Module, batches: Sequence[Inputs], *, reference: nn.Module | None = None) -> Outcome:
        targets, refused = targets_in(model, exclude=self.exclude, by="AdaRound")
        wanted = switched_off(model) if reference is None else reference
        visited = stages(model, list(targets), batches[0])
        for stage in visited:
            for path, products in _products(model, wanted, stage, targets, batches).items():
                target = targets[path]
                lattice = target.lattice()
                rows = learn_rounding(
                    target.rows(),
                    products,
                    lattice,
                    steps=self.steps,
                    learning_rate=self.learning_rate,
                    strength=self.strength,
                )
                target.write(rows, lattice)
        return outcome(targets, visited, refused)


def _products(
    model: nn.Module, reference: nn.Module, stage: Stage, targets: Mapping[str, Target], batches: Sequence[Inputs]
) -> dict[str, Products]:
    found: dict[str, Products] = {}
    for path, x, wanted in paired_inputs_of(model, reference, stage, batches):
        for rows, wanted_rows in targets[path].read_pair(x, wanted):
            part = Products.of(rows, wanted_rows)
            found[path] = found[path] + part if path in found else part
    return found


def _share(logits: Tensor) -> Tensor:
    """Return h(V), how far above its lower level each weight lies, in [0, 1] (equation 23)."""
    return torch.clamp(torch.sigmoid(logits) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)


def _start(share: Tensor) -> Tensor:
    """Return the V with h(V) = share."""
    return torch.logit((share - _GAMMA) / (_ZETA - _GAMMA))


def _undecided(share: Tensor, exponent: float) -> Tensor:
    """Return how far the shares are from 0 and 1, summed (equation 24)."""
    return (1.0 - (2.0 * share - 1.0).abs().pow(exponent)).sum()


def _exponent(progress: float, beta: tuple[float, float], warmup: float) -> float:
    """Return the regularizer's exponent: from `beta[0]` at the end of the warmup to `beta[1]`, along half a cosine."""
    passed = (progress - warmup) / (1.0 - warmup)
    return beta[1] + (beta[0] - beta[1]) * 0.5 * (1.0 + math.cos(math.pi * passed))
