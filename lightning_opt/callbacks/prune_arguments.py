"""What a pruner is asked for, checked as far as it can be without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_opt.callbacks.moments import Length, Moment
from lightning_opt.callbacks.prune_plan import Plan
from lightning_opt.callbacks.prune_structures import StructurePlan
from lightning_opt.callbacks.prune_timeline import Timeline
from lightning_opt.callbacks.prune_weights import WeightPlan
from lightning_opt.forward import Inputs
from lightning_opt.pruning.allocation import ERK, LAMP, Allocation
from lightning_opt.pruning.criteria import Criterion, GroupCriterion, GroupNorm, Magnitude
from lightning_opt.pruning.patterns import NM, Block, Element, Pattern
from lightning_opt.pruning.regrow import Regrow
from lightning_opt.pruning.solvers import SparseGPT
from lightning_opt.pruning.structured import Of, Sizes, Structures


@dataclass(frozen=True, kw_only=True)
class What:
    """What is pruned, and by which rules; the fields are the arguments of `Prune`."""

    pattern: Pattern | Structures
    criterion: Criterion | GroupCriterion | None
    allocation: Allocation | Sizes | str | None
    sparsity: float
    of: Of
    regrow: Regrow | None
    solver: SparseGPT | None
    include: Sequence[str]
    exclude: Sequence[str]
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern | Structures):
            raise ValueError(f"pattern={self.pattern!r}: give a Pattern such as Element(), or Structures(...)")
        if isinstance(self.sparsity, bool) or not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity={self.sparsity!r}: give the share that goes, more than 0 and less than 1")
        if self.of not in ("units", "params", "flops"):
            raise ValueError(f"of={self.of!r}: give 'units', 'params' or 'flops'")
        for name in ("include", "exclude"):
            names = getattr(self, name)
            if isinstance(names, str) or not all(isinstance(one, str) for one in names):
                raise ValueError(f"{name}={names!r}: give a list of names, such as ['encoder.*']")
            object.__setattr__(self, name, tuple(names))
        fits = self._structures_fit() if isinstance(self.pattern, Structures) else self._weights_fit()
        wrong = next((name for name, is_right in fits.items() if not is_right), None)
        if wrong is not None:
            raise ValueError(f"{wrong}={getattr(self, wrong)!r} does not go with pattern={self.pattern!r}")

    def _structures_fit(self) -> dict[str, bool]:
        return {
            "criterion": self.criterion is None or isinstance(self.criterion, Criterion | GroupCriterion),
            "allocation": self.allocation in (None, "uniform", "global") or isinstance(self.allocation, Sizes),
            "regrow": self.regrow is None,
            "solver": self.solver is None,
        }

    def _weights_fit(self) -> dict[str, bool]:
        assert isinstance(self.pattern, Pattern)
        return {
            "criterion": self.criterion is None or isinstance(self.criterion, Criterion),
            "allocation": self.allocation is None or isinstance(self.allocation, Allocation),
            "regrow": self.regrow is None or (isinstance(self.regrow, Regrow) and self.pattern.density is None),
            "solver": self.solver is None
            or (isinstance(self.solver, SparseGPT) and isinstance(self.pattern, Element | NM | Block)),
            "of": self.of == "units",
        }

    @property
    def can_shrink(self) -> bool:
        """Whether what is masked can be removed."""
        return isinstance(self.pattern, Structures)

    def plan(self, root: nn.Module, *, example_inputs: Callable[[], Inputs], taps: Sequence[str]) -> Plan:
        """Apply the rules to a network.

        Args:
            root: The network.
            example_inputs: Gives what it can be traced with; called for structures only.
            taps: Names of modules that must keep the width of their answers.

        Raises:
            ConfigError: They do not fit it.
        """
        names: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "seed": self.seed}
        if isinstance(self.pattern, Structures):
            return StructurePlan(
                root,
                example_inputs=example_inputs(),
                pattern=self.pattern,
                criterion=self.criterion or GroupNorm(),
                allocation=self.allocation or "uniform",
                of=self.of,
                sparsity=self.sparsity,
                taps=taps,
                **names,
            )
        criterion = self.criterion or Magnitude()
        # LAMP compares magnitudes; ERK asks for nothing but shapes.
        allocation = self.allocation or (LAMP() if isinstance(criterion, Magnitude) else ERK())
        assert isinstance(criterion, Criterion)
        assert isinstance(allocation, Allocation)
        return WeightPlan(
            root,
            pattern=self.pattern,
            criterion=criterion,
            allocation=allocation,
            sparsity=self.sparsity,
            regrow=self.regrow,
            solver=self.solver,
            **names,
        )

    def __str__(self) -> str:
        rules = (self.pattern, self.solver or self.criterion, self.allocation, self.regrow)
        return ", ".join(rule if isinstance(rule, str) else type(rule).__name__ for rule in rules if rule is not None)


@dataclass(frozen=True)
class When:
    """The moments of a timeline, as the user wrote them."""

    start: Moment
    end: Moment
    every: Moment
    shrink: Moment | None

    @classmethod
    def read(cls, *, start: Any, end: Any, every: Any, shrink_at: Any, can_shrink: bool) -> "When":
        """Make the moments from the arguments of `Prune`.

        Raises:
            ValueError: One is no moment, `end` comes before `start`, or nothing can be removed at `shrink_at`.
        """
        first, last = Moment.read("start", start), Moment.read("end", end)
        if first.unit == last.unit and last.amount < first.amount:
            raise ValueError(
                f"end={end!r} comes before start={start!r}: swap them, or make them equal to prune at once"
            )
        if shrink_at is not None and not can_shrink:
            raise ValueError(f"shrink_at={shrink_at!r}: only a pattern of Structures can be removed; others are masked")
        shrink = replace(last, name="shrink_at") if shrink_at is None else Moment.read("shrink_at", shrink_at)
        return cls(first, last, Moment.read("every", every), shrink if can_shrink else None)

    def resolve(self, length: Length) -> Timeline:
        """Turn the moments into optimizer steps.

        Raises:
            ConfigError: They do not fit the training.
        """
        return Timeline.resolve(length, start=self.start, end=self.end, every=self.every, shrink=self.shrink)
