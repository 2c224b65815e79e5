"""When a pruner acts, as optimizer steps of one training."""

from dataclasses import asdict, dataclass
from typing import Any

from lightning_opt.callbacks.moments import Length, Moment
from lightning_opt.errors import ConfigError


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
