"""Moments of a training: as a user writes them, and as optimizer steps."""

import math
import re
from dataclasses import dataclass

import lightning.pytorch as pl

from lightning_opt.errors import ConfigError

_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?)\s*")
_HOW = "give a share of all optimizer steps from 0 to 1, or text such as '120 steps' or '3 epochs'"


@dataclass(frozen=True)
class Moment:
    """A point of a training, as `1 share`, `n steps` or `n epochs`.

    Attributes:
        name: The argument that it came from, for messages.
        written: What the user wrote.
        amount: How many.
        unit: "share", "steps" or "epochs".
    """

    name: str
    written: float | str
    amount: float
    unit: str

    @classmethod
    def read(cls, name: str, value: float | str) -> "Moment":
        """Make a moment from an argument.

        Raises:
            ValueError: The value is no moment; the message names the argument and the value.
        """
        if isinstance(value, str):
            found = _TEXT.fullmatch(value)
            if found is None:
                raise ValueError(f"{name}={value!r}: {_HOW}")
            return cls(name, value, float(found[1]), found[2].rstrip("s") + "s")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value!r}: {_HOW}")
        return cls(name, value, float(value), "share")

    def to_steps(self, length: "Length") -> int:
        """Return the optimizer step.

        Raises:
            ConfigError: It depends on how long training is, and nobody knows.
        """
        if self.unit == "steps":
            return round(self.amount)
        known = length.total_steps if self.unit == "share" else length.steps_per_epoch
        if known is None:
            need = "trainer.max_steps or trainer.max_epochs" if self.unit == "share" else "data with a length"
            raise ConfigError(
                f"{self.name}={self.written!r} needs to know how long training is: set {need}, or write "
                f"{self.name}='120 steps'"
            )
        return round(self.amount * known)


@dataclass(frozen=True, kw_only=True)
class Length:
    """How many optimizer steps a training and its epochs have; None where nobody knows."""

    total_steps: int | None
    steps_per_epoch: int | None

    @classmethod
    def of(cls, trainer: "pl.Trainer") -> "Length":
        """Return the length of what a trainer is about to fit, counted as `trainer.global_step` counts."""
        batches = trainer.num_training_batches
        # with manual optimization each optimizer's step counts
        manual = not trainer.lightning_module.automatic_optimization
        each = max(len(trainer.optimizers), 1) if manual else 1
        accumulated = 1 if manual else trainer.accumulate_grad_batches
        return cls.bounded(trainer, each * math.ceil(batches / accumulated) if math.isfinite(batches) else None)

    @classmethod
    def bounded(cls, trainer: "pl.Trainer", per_epoch: int | None) -> "Length":
        """Return the length of epochs of so many steps within a trainer's `max_epochs` and `max_steps`."""
        epochs, limit = trainer.max_epochs, trainer.max_steps
        limits = [limit] if limit not in (None, -1) else []
        if per_epoch is not None and epochs not in (None, -1):
            limits.append(per_epoch * max(int(epochs or 0), 1))
        return cls(total_steps=min(limits) if limits else None, steps_per_epoch=per_epoch)
