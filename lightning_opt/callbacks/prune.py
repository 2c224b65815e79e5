"""Prune while training."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_opt.callbacks.change import ModelChange
from lightning_opt.callbacks.moments import Length
from lightning_opt.callbacks.neighbours import (
    forget_best_if_settled,
    hold_early_stopping,
    save_soon,
)
from lightning_opt.callbacks.network import example_of, find_root
from lightning_opt.callbacks.prune_arguments import What, When
from lightning_opt.callbacks.prune_plan import Plan
from lightning_opt.callbacks.prune_run import Pruning
from lightning_opt.callbacks.prune_target import refuse_optimizers, refuse_strategy, taps_of
from lightning_opt.callbacks.prune_timeline import Timeline
from lightning_opt.callbacks.shards import is_spread, settle_shards
from lightning_opt.callbacks.support import check_pair
from lightning_opt.checkpointing.recipe import install
from lightning_opt.forward import Inputs
from lightning_opt.pruning.allocation import Allocation
from lightning_opt.pruning.criteria import Criterion, GroupCriterion
from lightning_opt.pruning.patterns import Element, Pattern
from lightning_opt.pruning.regrow import Regrow
from lightning_opt.pruning.schedules import Cubic, Schedule
from lightning_opt.pruning.solvers import SparseGPT
from lightning_opt.pruning.structured import Of, Sizes, Structures


class Prune(ModelChange):
    """Masks weights more and more while a model trains, or masks whole structures and then removes them.

    Acts: at `start`, every `every` and at `end`, in `on_train_batch_end` once an optimizer step is done, so never with
    half-accumulated gradients, masks are chosen anew; right after each optimizer step masked weights are put back to
    zero, in one fused call. With structures, at `shrink_at` what is masked leaves the model, the optimizers and the
    averages. Gradients and activations are watched only for the steps before an update, and only if the criterion
    reads them. Until the last moment early stopping is held back and no checkpoint counts as best.

    Leaves in a checkpoint: bit-packed masks, evidence, the moments in steps, what weights were before a rewind, and the
    recipe of what was removed; all plain tensors, numbers and text. A run that is stopped anywhere and resumed ends
    bit-equal. Names in the state dict never change.

    Strategies: one device; ddp, where the first process decides for all; fsdp2, with the masks that one process would
    choose, whatever the shards; tensor parallelism and pipelines for single weights and criteria that do not read the
    inputs of layers. The rest is refused by name (`callbacks.support`), as are, for structures, processes that are
    forked or spawned from one that keeps the dense model.

    To choose the sparsity in another way, override `decide`.

    Args:
        pattern: What goes: single weights (`Element`), `NM`, `Block`, `Rows`, `Columns`, or `Structures` (channels,
            heads, hidden units: these can be removed).
        criterion: What stays: scores weights or structures; their magnitude when not given.
        allocation: How the sparsity is shared among tensors; LAMP when not given (ERK where
            the criterion is not magnitude). Structures: "uniform", "global" or a
            `Sizes`.
        schedule: How the sparsity grows from `start` to `end`; `Cubic` when not given.
        sparsity: Share of the named weights (of the units of each structure) that is gone in the end: of those that
            there were at the start, however often masks are updated. A pattern that fixes its density does not read it.
        of: What the sparsity of structures is a share of: each group's "units", the model's "params" or its "flops".
        start: Moment of the first update: a share of all optimizer steps, or text such as "120 steps" or "3 epochs".
        end: Moment of the last update; what follows lets the model heal.
        every: Time between two updates.
        shrink_at: When masked structures are removed; with `end` when not given.
        include: Names of weights or modules; `*` stands for anything.
        exclude: Names of weights or modules that stay as they are.
        regrow: Gives masked weights another chance at each update, at the same sparsity.
        solver: Rewrites the weights that stay.
        penalty: Strength of an L1 penalty on batch-norm scales until the last update (network slimming).
        module: Name of the network inside the LightningModule; found when not given.
        example_inputs: To trace the network with, for structures; the data module's when not given.
        seed: For criteria that draw.
        observe_steps: For how many optimizer steps before an update evidence is gathered.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    _run: Pruning | None
    keeps = "the masks would be lost; keep pattern, module, include and exclude as they were"

    def __init__(
        self,
        pattern: Pattern | Structures = Element(),  # noqa: B008 - frozen
        *,
        criterion: Criterion | GroupCriterion | None = None,
        allocation: Allocation | Sizes | str | None = None,
        schedule: Schedule | None = None,
        sparsity: float = 0.9,
        of: Of = "units",
        start: float | str = 0.1,
        end: float | str = 0.7,
        every: float | str = 0.01,
        shrink_at: float | str | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        regrow: Regrow | None = None,
        solver: SparseGPT | None = None,
        penalty: float = 0.0,
        module: str | None = None,
        example_inputs: Inputs | None = None,
        seed: int = 0,
        observe_steps: int = 32,
    ) -> None:
        if observe_steps < 1:
            raise ValueError(f"observe_steps={observe_steps!r}: give 1 or more")
        if not penalty >= 0.0:
            raise ValueError(f"penalty={penalty!r}: give 0 or more")
        self.what = What(
            pattern=pattern,
            criterion=criterion,
            allocation=allocation,
            sparsity=sparsity,
            of=of,
            regrow=regrow,
            solver=solver,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        self.when = When.read(start=start, end=end, every=every, shrink_at=shrink_at, can_shrink=self.what.can_shrink)
        self.schedule = schedule or Cubic()
        self.module, self.example_inputs = module, example_inputs
        self.observe_steps, self.penalty = observe_steps, penalty
        self._root_name = ""
        self._plan: Plan | None = None
        super().__init__(
            pattern=type(pattern).__name__, module=module, include=self.what.include, exclude=self.what.exclude
        )

    @property
    def timeline(self) -> Timeline:
        """The moments as optimizer steps; known once training has started.

        Raises:
            RuntimeError: It has not.
        """
        if self._run is None:
            raise RuntimeError("the timeline is known once training has started")
        return self._run.timeline

    def decide(self, step: int) -> float:
        """Return the fraction of the final sparsity that is due after `step` optimizer steps, 0 to 1."""
        return self.schedule.at(self.timeline.progress(step))

    def check(self, network: nn.Module, *, example_inputs: Inputs | None = None, length: Length | None = None) -> None:
        """Refuse before training what does not fit a network or a training; nothing is changed.

        Args:
            network: What would be pruned.
            example_inputs: To trace it with; without them structures are not looked at.
            length: Of the training; without it moments are not looked at.

        Raises:
            ConfigError: Naming the argument and the value.
        """
        inputs = self.example_inputs if example_inputs is None else example_inputs
        if not self.what.can_shrink or inputs is not None:
            self.what.plan(network, example_inputs=lambda: inputs, taps=())  # type: ignore[arg-type, return-value]
        if length is not None:
            self.when.resolve(length)

    def stages(self) -> list[dict[str, Any]]:
        """Return what was done, as `{method, from_step, to_step, what}`."""
        return [] if self._run is None else self._run.stages(str(self.what))

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        refuse_strategy(trainer, shrinks=self.what.can_shrink)
        check_pair(trainer.strategy, self)
        install(pl_module)
        self._root_name, root = find_root(pl_module, self.module)
        if stage == "fit":
            self._run, self._loaded, self._settled = None, None, False
            self._plan = self.what.plan(
                root,
                example_inputs=lambda: example_of(trainer, pl_module, self.example_inputs),
                taps=taps_of(pl_module),
            )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self._plan is not None
        spread = is_spread(trainer.strategy)
        if spread:
            settle_shards(pl_module)
        self._plan.bind(trainer, spread=spread)
        if self.what.can_shrink:
            refuse_optimizers(trainer.optimizers)
        loaded, self._loaded = self._loaded, None
        self._run = Pruning(
            trainer,
            root_name=self._root_name,
            plan=self._plan,
            timeline=Timeline(**loaded["timeline"]) if loaded else self.when.resolve(Length.of(trainer)),
            observe_steps=self.observe_steps,
            schedule=self.schedule,
            penalty=self.penalty,
        )
        self._release = hold_early_stopping(trainer, lambda: self.is_settled)
        if loaded:
            self._settled = loaded["settled"]
            self._run.load_state_dict(loaded)
            self._run.attach()
            return
        self._run.attach()
        self._log(trainer, pl_module, to_callbacks=False)
        self._advance(trainer, pl_module, to_callbacks=False)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if self._run is not None:
            self._run.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None and trainer.global_step != self._run.step:
            self._advance(trainer, pl_module)

    def _advance(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *, to_callbacks: bool = True) -> None:
        run = self._run
        assert run is not None
        before = run.step
        changed = run.advance(trainer.global_step, self.decide)
        if run.is_shrink_due(before):
            changed |= self._shrink(trainer, pl_module, run)
        if changed:
            self._log(trainer, pl_module, to_callbacks=to_callbacks)
        if not self._settled and run.is_over:
            self._settled = True
            forget_best_if_settled(trainer)

    def _shrink(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", run: Pruning) -> bool:
        """Remove what is masked, and tell the other pruners of the same network."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, Prune) and c is not self and c._prunes(run.plan.root)]
        for other in others:  # what they have seen of the old shapes is used first
            other.on_train_batch_end(trainer, pl_module, None, None, 0)
        edit = run.shrink()
        for other in others:
            if edit is not None and other._run is not None:
                other._run.follow(edit)
        save_soon(trainer)
        return edit is not None

    def _prunes(self, root: nn.Module) -> bool:
        return self._run is not None and self._run.plan.root is root

    def _log(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *, to_callbacks: bool) -> None:
        assert self._run is not None
        values = self._run.measures()
        for logger in trainer.loggers:  # at once: `log` would drop it on steps that are not logged
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        if to_callbacks:
            pl_module.log_dict(values, on_step=True, on_epoch=False, logger=False)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._settled:
            rank_zero_warn(
                f"training ended at step {trainer.global_step}, before pruning was over (step {self.timeline.last})"
            )
        self._end()
