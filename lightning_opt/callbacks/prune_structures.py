"""Which channels, heads and hidden units a pruner masks, and how they leave the model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_opt.callbacks.neighbours import averages
from lightning_opt.callbacks.prune_target import check_names, matches
from lightning_opt.callbacks.shards import unwrapped, whole_weights
from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.state import uncompiled
from lightning_opt.forward import Inputs, map_inputs
from lightning_opt.modules.taps import match_modules
from lightning_opt.pruning.criteria import Criterion, GroupCriterion, Magnitude
from lightning_opt.pruning.criteria.base import Evidence
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.parts import Layout
from lightning_opt.pruning.statistics import Statistics
from lightning_opt.pruning.structure import Group, trace
from lightning_opt.pruning.structured import Of, Sizes, Structures, choose, score
from lightning_opt.surgery import Edit, apply_with_optimizers, recipe_of

_INPUT = ":in"


class StructurePlan:
    """Masks over whole structures of a network, and the edit that removes them.

    Args:
        root: The network.
        example_inputs: To trace it with.
        pattern: Which structures, to which widths.
        criterion: Scores structures, or weights that are summed over each.
        allocation: "uniform", "global", or an object that gives each group its size.
        of: What the sparsity is a share of.
        sparsity: The share that goes in the end.
        include: Names of groups, or of tensors or modules that they run through.
        exclude: Likewise, of those that stay.
        taps: Names of modules whose answers are compared with something of a fixed width: they keep theirs.
        seed: For criteria that draw.

    Raises:
        ConfigError: The network cannot be traced, nothing is left to prune, or the sparsity would empty something.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        example_inputs: Inputs,
        pattern: Structures,
        criterion: Criterion | GroupCriterion,
        allocation: Any,
        of: Of,
        sparsity: float,
        include: Sequence[str],
        exclude: Sequence[str],
        taps: Sequence[str],
        seed: int,
    ) -> None:
        self.root, self.pattern, self.criterion, self.allocation, self.of = root, pattern, criterion, allocation, of
        self.sparsity, self.include, self.exclude, self.taps, self.seed = sparsity, include, exclude, taps, seed
        self.example_inputs = example_inputs
        self.total = sum(parameter.numel() for parameter in root.parameters())
        self.kept: dict[str, list[int]] = {}
        self._fraction = 0.0
        self.layout: Layout | None = None
        self._trainer: pl.Trainer | None = None
        self._look()
        self._try()

    def _look(self) -> None:
        """Trace the network as it is now."""
        self._edits = len(recipe_of(self.root))
        inputs = map_inputs(self.example_inputs, partial(_like, next(self.root.parameters())))
        with uncompiled(self.root), _answering_with(self.root, self.taps):
            self.structure = trace(self.root, inputs)
            if isinstance(self.allocation, Sizes):
                self.allocation = self.allocation.for_model(self.root, inputs)
        try:
            groups = self.pattern.of(self.structure)
        except ValueError as error:
            raise ConfigError(f"pattern={self.pattern}: {error}") from error
        names = [name for group in groups for name in _names_of(group)]
        check_names("include", self.include, names)
        check_names("exclude", self.exclude, names)
        self.groups = tuple(g for g in groups if self._is_meant(g))
        if not self.groups:
            raise ConfigError(
                f"include={list(self.include)!r}, exclude={list(self.exclude)!r}: none of "
                f"{', '.join(g.name for g in groups)} is left to prune"
            )
        members = {m.tensor for group in self.groups for m in group.members if m.is_parameter}
        self.parameters = {name: p for name, p in self.root.named_parameters() if name in members}
        self.statistics = Statistics.of(self.root, self.parameters, self.criterion)

    def bind(self, trainer: "pl.Trainer", *, spread: bool) -> None:
        """Take up the parameters that the strategy has put in the place of the network's own."""
        self._trainer = trainer if spread else None
        if not spread:
            return
        named = dict(self.root.named_parameters())
        self.parameters = {name: named[name] for name in self.parameters}
        self.layout = Layout.of(self.parameters)
        self.statistics = Statistics.of(self.root, self.parameters, self.criterion, layout=self.layout)

    def _is_meant(self, group: Group) -> bool:
        names = _names_of(group)
        return any(matches(name, self.include) for name in names) and not any(matches(n, self.exclude) for n in names)

    def _try(self) -> None:
        """Refuse before training what could not be done at its end."""
        by = Magnitude(p=2) if self.needs else self.criterion
        try:
            kept = self._choose(score(self.structure, self.groups, self.root, by), self.sparsity)
            self.structure.edit(kept)
        except ValueError as error:
            raise ConfigError(f"sparsity={self.sparsity}, criterion={self.criterion}: {error}") from error
        if not kept:
            raise ConfigError(
                f"pattern={self.pattern}, sparsity={self.sparsity}: nothing would go, with widths of "
                f"{', '.join(str(group.size) for group in self.groups[:8])} in steps of {self.pattern.round_to}; lower "
                "round_to or raise sparsity"
            )

    def _choose(self, scores: Mapping[str, Tensor], ratio: float) -> dict[str, list[int]]:
        return choose(self.structure, scores, ratio=ratio, of=self.of, pattern=self.pattern, allocation=self.allocation)

    @property
    def needs(self) -> frozenset[str]:
        """Name the evidence that `choose` reads."""
        return self.criterion.needs

    @torch.no_grad()
    def choose(self, fraction: float) -> dict[str, Tensor]:
        """Return the bool masks at a fraction of the final sparsity; the first process decides for all."""
        with self._whole_weights():
            kept = self._choose(self._scores(), fraction * self.sparsity)
        self.kept, self._fraction = first_decides(kept), fraction
        found = self.structure.masks(self.kept)
        every = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in self.parameters.items()}
        masks = {name: found.get(name, mask) for name, mask in every.items()}
        if self.layout is None:
            return masks
        return {name: self.layout.part(name, mask) for name, mask in masks.items()}

    def _scores(self) -> dict[str, Tensor]:
        statistics = self.statistics if self.layout is None else _WholeEvidence(self.statistics)
        return score(self.structure, self.groups, self.root, self.criterion, statistics, seed=self.seed)

    def _whole_weights(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._trainer is None else whole_weights(self._trainer.lightning_module)

    def exchange(self, masks: Masks, *, progress: float, update: int) -> dict[str, Tensor] | None:
        """Exchange nothing: a structure whose weights are all zero gets no gradient."""
        return None

    def shrink(self, trainer: "pl.Trainer") -> Edit | None:
        """Remove what is masked from the network, the optimizers and the averages; return what was done.

        Raises:
            ConfigError: An optimizer's state cannot be cut; nothing has been changed.
        """
        if not self.kept:
            return None
        edit = self.structure.edit(self.kept)
        with unwrapped(trainer):
            apply_with_optimizers(self.root, edit, trainer.optimizers, also=averages(trainer))
        return edit

    def retire(self) -> None:
        """Mask nothing more: what was masked is gone."""
        self.parameters, self.kept, self.layout = {}, {}, None
        self.statistics = Statistics(self.root, (), ())

    def refresh(self) -> None:
        """Trace anew if the network has changed since: a checkpoint's recipe was replayed."""
        if len(recipe_of(self.root)) != self._edits:
            self._look_again()

    def follow(self, edit: Edit) -> None:
        """Take up the new shapes after another pruner has removed structures."""
        self._look_again()
        if self.kept:
            self.choose(self._fraction)

    def _look_again(self) -> None:
        """Trace the network in the middle of a training: for that it has to be whole."""
        trainer = self._trainer
        if trainer is None:
            self._look()
            return
        with unwrapped(trainer):
            self._look()
        self.bind(trainer, spread=True)

    def remaining(self, masks: Masks) -> int:
        """Return how many parameters of the network are neither gone nor masked."""
        shares = masks.per_layer()
        masked = sum(p.numel() * shares.get(name, 0.0) for name, p in self.parameters.items())
        return sum(parameter.numel() for parameter in self.root.parameters()) - round(masked)

    def state_dict(self) -> dict[str, Any]:
        """Return which units stay."""
        kept = {name: torch.tensor(units, dtype=torch.int32) for name, units in self.kept.items()}
        return {"kept": kept, "fraction": self._fraction, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.kept = {name: units.tolist() for name, units in state["kept"].items()}
        self._fraction, self.total = state["fraction"], state["total"]


class _WholeEvidence(Statistics):
    """What is known about whole weights of which each process holds a part; all processes ask for the same."""

    def __init__(self, parts: Statistics) -> None:
        self.names, self._parts = parts.names, parts

    def evidence(self, name: str, seed: int = 0) -> Evidence:
        """Return what is known about one whole weight."""
        layout = self._parts.layout
        assert layout is not None
        found = self._parts.evidence(name, seed)
        return found.with_weight_shaped(lambda value: layout.whole(name, value, dtype=torch.float32))


def first_decides(value: Any) -> Any:
    """Return the first process's value on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _like(parameter: Tensor, value: Any) -> Any:
    """Bring an input to where, and to what, the network computes: under "bf16-true" batches are converted, too."""
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)


def _names_of(group: Group) -> list[str]:
    return [group.name, *(member.tensor for member in group.members)]


@contextmanager
def _answering_with(root: nn.Module, taps: Sequence[str]) -> Iterator[None]:
    """Let the network answer with its tapped features too: their axes then count as outputs, which keep their size."""
    if not taps:
        yield
        return
    features: list[Any] = []
    modules = dict(root.named_modules())
    handles = []
    for name in match_modules(root, taps):
        module = modules[name.removesuffix(_INPUT)]
        if name.endswith(_INPUT):
            handles.append(module.register_forward_pre_hook(lambda _, args: features.append(args)))
        else:
            handles.append(module.register_forward_hook(lambda _, args, answer: features.append(answer)))
    original = type(root)

    class Answering(original):  # type: ignore[misc, valid-type]  # a class, which copies of the network keep
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            features.clear()
            return (super().forward(*args, **kwargs), *features)

    root.__class__ = Answering
    try:
        yield
    finally:
        root.__class__ = original
        for handle in handles:
            handle.remove()
