"""When a pruner acts: moments as a user writes them, and as optimizer steps of one training."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The optimizer steps at which a pruner acts: `start`, then every `every` steps, and `end`.

    Attributes:
        start: The first update, after this many optimizer steps.
        end: The last update.
        every: Steps between two updates.
        shrink: When masked structures are removed; None: never.
        total: Steps of the training; None where nobody knows.
    """

    start: int
    end: int
    every: int
    shrink: int | None = None
    total: int | None = None

    @classmethod
    def resolve(cls, length: Length, *, start: Moment, end: Moment, every: Moment, shrink: Moment | None) -> "Timeline":
        """Turn moments into optimizer steps.

        Raises:
            ConfigError: `end` comes before `start`, `shrink_at` before `end`, or something after training.
        """
        first, last = start.to_steps(length), end.to_steps(length)
        if last < first:
            raise ConfigError(
                f"end={end.written!r} (step {last}) comes before start={start.written!r} (step {first}): "
                "swap them, or make them equal to prune at once"
            )
        cut = None if shrink is None else shrink.to_steps(length)
        if cut is not None and shrink is not None and cut < last:
            raise ConfigError(
                f"shrink_at={shrink.written!r} (step {cut}) comes before end={end.written!r} (step {last}): only what "
                "is masked can be removed; give it the same moment or a later one"
            )
        timeline = cls(
            start=first, end=last, every=max(every.to_steps(length), 1), shrink=cut, total=length.total_steps
        )
        for moment, step in ((start, first), (end, last), *([(shrink, cut)] if shrink is not None else [])):
            if timeline.total is not None and step is not None and step > timeline.total:
                raise ConfigError(
                    f"{moment.name}={moment.written!r} is step {step}, and training ends at step {timeline.total}: "
                    f"choose an earlier {moment.name} or train longer (trainer.max_epochs, trainer.max_steps)"
                )
        return timeline

    @property
    def last(self) -> int:
        """The step after which nothing more happens."""
        return self.end if self.shrink is None else self.shrink

    def progress(self, step: int) -> float:
        """Return how much of the schedule is over after `step` optimizer steps, in [0, 1]."""
        if step >= self.end:
            return 1.0
        return (step - self.start) / (self.end - self.start) if step > self.start else 0.0

    def is_due(self, before: int, now: int) -> bool:
        """Whether an update falls into the steps after `before` up to `now`."""
        return self._count(now) != self._count(before)

    def steps_to_next(self, step: int) -> int | None:
        """Return how many steps after `step` the next update comes; None after the last."""
        if step >= self.end:
            return None
        if step < self.start:
            return self.start - step
        return min(self.start + (self._count(step)) * self.every, self.end) - step

    def _count(self, step: int) -> int:
        """Return how many updates are due up to and with `step`."""
        if step < self.start:
            return 0
        count = (min(step, self.end) - self.start) // self.every + 1
        return count + (1 if step >= self.end and (self.end - self.start) % self.every else 0)

    def to_state(self) -> dict[str, Any]:
        """Return the steps as plain numbers."""
        return asdict(self)
