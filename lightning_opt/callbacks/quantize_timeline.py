"""When quantization-aware training acts: moments as a user writes them, and as optimizer steps of one training."""

from dataclasses import asdict, dataclass
from typing import Any

from lightning_opt.callbacks.moments import Length, Moment
from lightning_opt.errors import ConfigError

WARM_UP_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The optimizer steps after which something changes.

    Attributes:
        observe: From here on ranges are looked for, so that quantizers know some when they are switched on.
        start: Quantizers are switched on.
        freeze_observers: Ranges stay what they are.
        freeze_batch_norm: Statistics of batch norms stay what they are; None: never.
        total: Steps of the training; None where nobody knows.
    """

    observe: int
    start: int
    freeze_observers: int
    freeze_batch_norm: int | None = None
    total: int | None = None

    def observes(self, step: int) -> bool:
        """Whether ranges are looked for after `step` optimizer steps."""
        return self.observe <= step < self.freeze_observers

    def is_on(self, step: int) -> bool:
        """Whether quantizers round after `step` optimizer steps."""
        return step >= self.start

    def is_settled(self, step: int) -> bool:
        """Whether the grids of activations are final after `step` optimizer steps."""
        return step >= self.freeze_observers

    def holds_batch_norm(self, step: int) -> bool:
        """Whether batch norms keep their statistics after `step` optimizer steps."""
        return self.freeze_batch_norm is not None and step >= self.freeze_batch_norm

    def to_state(self) -> dict[str, Any]:
        """Return the steps as plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class When:
    """The moments of the phases, as the user wrote them."""

    start: Moment
    freeze_observers: Moment
    freeze_batch_norm: Moment | None

    @classmethod
    def read(cls, *, start: Any, freeze_observers: Any, freeze_batch_norm: Any) -> "When":
        """Make the moments from the arguments of `Quantize`.

        Raises:
            ValueError: One is no moment, or a freeze comes before `start`.
        """
        first = Moment.read("start", start)
        observers = Moment.read("freeze_observers", freeze_observers)
        norm = None if freeze_batch_norm is None else Moment.read("freeze_batch_norm", freeze_batch_norm)
        for moment in (observers, norm):
            if moment is not None and moment.unit == first.unit and moment.amount < first.amount:
                raise ValueError(
                    f"{moment.name}={moment.written!r} comes before start={first.written!r}: there would be nothing "
                    "to freeze; give a later moment"
                )
        return cls(first, observers, norm)

    def resolve(self, length: Length) -> Phases:
        """Turn the moments into optimizer steps.

        Quantizers are switched on after one step at the earliest: before it, no activation has been seen.

        Raises:
            ConfigError: They do not fit the training.
        """
        start, total = max(self.start.to_steps(length), 1), length.total_steps
        if total is not None and start >= total:
            raise ConfigError(
                f"start={self.start.written!r} is step {start}, and training ends at step {total}: no step would be "
                "left to train with quantizers; choose an earlier start or train longer (trainer.max_epochs, "
                "trainer.max_steps)"
            )
        observers = self._freeze(self.freeze_observers, start, length)
        norm = None if self.freeze_batch_norm is None else self._freeze(self.freeze_batch_norm, start, length)
        return Phases(
            observe=max(start - WARM_UP_STEPS, 0),
            start=start,
            freeze_observers=observers,
            freeze_batch_norm=norm,
            total=total,
        )

    def _freeze(self, moment: Moment, start: int, length: Length) -> int:
        step, total = moment.to_steps(length), length.total_steps
        if step < start and not (start == 1 and step == 0):
            raise ConfigError(
                f"{moment.name}={moment.written!r} (step {step}) comes before start={self.start.written!r} (step "
                f"{start}): there would be nothing to freeze; give a later moment"
            )
        if total is not None and step > total:
            raise ConfigError(
                f"{moment.name}={moment.written!r} is step {step}, and training ends at step {total}: choose an "
                f"earlier {moment.name} or train longer (trainer.max_epochs, trainer.max_steps)"
            )
        return max(step, start)
