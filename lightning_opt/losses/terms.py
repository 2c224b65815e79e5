"""A loss with its weight and the name under which it is logged."""

import re

from torch import Tensor, nn

from lightning_opt.losses.base import DistillationLoss, Signals, Supervision
from lightning_opt.losses.schedules import Schedule, check_value, value_at


class Term(nn.Module):
    """Hold one summand of the training loss.

    Args:
        loss: What is computed.
        weight: What it is multiplied with in the total; a number or a schedule, at least 0.
        name: Names the term in logs, as in `train/loss_kd`. None: the loss's class name in snake case.

    Raises:
        ValueError: `weight` is negative, or `name` holds anything but letters, digits and underscores.
    """

    def __init__(self, loss: DistillationLoss, *, weight: float | Schedule = 1.0, name: str | None = None) -> None:
        super().__init__()
        check_value("weight", weight, low=0.0)
        name = snake_case(type(loss).__name__) if name is None else name
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"name must be made of letters, digits and underscores, not {name!r}")
        self.loss = loss
        self.weight = weight
        self.name = name

    def weight_at(self, progress: float) -> float:
        """Return the weight at a fraction of the run in [0, 1]."""
        return value_at(self.weight, progress)

    def forward(self, student: Signals, teacher: Signals, supervision: Supervision) -> Tensor:
        """Return the loss without its weight, a scalar."""
        value: Tensor = self.loss(student, teacher, supervision)
        return value


def snake_case(name: str) -> str:
    """Turn a class name into a snake case one.

    >>> snake_case("RKDDistance"), snake_case("GeneralizedJSD"), snake_case("KD")
    ('rkd_distance', 'generalized_jsd', 'kd')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
