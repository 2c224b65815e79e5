"""Drop whole layers while training."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_opt.callbacks.moments import Length, Moment
from lightning_opt.callbacks.neighbours import (
    averages,
    forget_best_if_settled,
    hold_early_stopping,
    nothing,
    restore_averages,
    save_soon,
)
from lightning_opt.callbacks.network import example_of, find_root
from lightning_opt.callbacks.prune import Prune
from lightning_opt.callbacks.prune_run import count
from lightning_opt.callbacks.prune_structures import first_decides
from lightning_opt.callbacks.prune_target import refuse_optimizers, refuse_strategy, taps_of
from lightning_opt.callbacks.shards import unwrapped
from lightning_opt.callbacks.support import check_pair
from lightning_opt.checkpointing.recipe import install
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, map_inputs
from lightning_opt.pruning.depth import Position, drop_by_angular_distance, find_stack
from lightning_opt.surgery import Recipe, apply_with_optimizers


class PruneDepth(pl.Callback):
    """Takes the run of layers out of a stack that turns what passes through it least; what follows lets the model heal.

    Gromov et al. (2024), arXiv 2403.17887; see `lightning_opt.pruning.angular_distances`.

    Acts: once, in `on_train_batch_end` after the optimizer step `at`. The layers leave the model, the optimizers and
    averages of weights. Until then early stopping is held back and no checkpoint counts as best. Leaves in a
    checkpoint: whether it is done, and what it did; the recipe is the model's. Strategies: one device, ddp and fsdp2,
    where the first process decides for all.

    Args:
        drop: How many layers.
        at: Moment: a share of all optimizer steps, or text such as "120 steps" or "3 epochs".
        path: Name of the stack, an `nn.ModuleList` or `nn.Sequential`; the longest one when not given.
        position: At which tokens what passes is compared: "last" for models that read from left to right, or "all".
        samples: How many training samples are looked at.
        module: Name of the network inside the LightningModule; found when not given.
        example_inputs: The samples; the data module's when not given.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
        self,
        drop: int,
        *,
        at: float | str = 0.3,
        path: str | None = None,
        position: Position = "last",
        samples: int = 64,
        module: str | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        for name, value in (("drop", drop), ("samples", samples)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a number of 1 or more")
        if position not in ("last", "all"):
            raise ValueError(f"position={position!r}: give 'last' or 'all'")
        self.drop, self.path, self.position, self.samples = drop, path, position, samples
        self.module, self.example_inputs = module, example_inputs
        self._at = Moment.read("at", at)
        self._step: int | None = None
        self._root: nn.Module | None = None
        self._done: dict[str, int] = {}
        self._release = nothing

    @property
    def is_settled(self) -> bool:
        """Whether the model has its final form."""
        return bool(self._done)

    def check(self, network: nn.Module, *, example_inputs: Inputs | None = None, length: Length | None = None) -> None:
        """Refuse before training what does not fit a network or a training; nothing is changed.

        Raises:
            ConfigError: Naming the argument and the value.
        """
        try:
            path = find_stack(network) if self.path is None else self.path
            layers = len(network.get_submodule(path))  # type: ignore[arg-type]
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"path={self.path!r}: {error}; name a ModuleList or a Sequential") from error
        if self.drop >= layers:
            raise ConfigError(f"drop={self.drop}: {path!r} has {layers} layers, and one at least must stay")
        if length is not None:
            self._resolve(length)

    def _resolve(self, length: Length) -> int:
        step = self._at.to_steps(length)
        if length.total_steps is not None and step > length.total_steps:
            raise ConfigError(
                f"at={self._at.written!r} is step {step}, and training ends at step {length.total_steps}: choose an "
                "earlier one or train longer"
            )
        return step

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        refuse_strategy(trainer, shrinks=True)
        check_pair(trainer.strategy, self)
        install(pl_module)
        _, self._root = find_root(pl_module, self.module)
        if stage != "fit":
            return
        self._step, self._done = None, {}
        self.check(self._root)
        self._refuse_company(trainer, taps_of(pl_module))

    def _refuse_company(self, trainer: "pl.Trainer", taps: Sequence[str]) -> None:
        assert self._root is not None
        path = find_stack(self._root) if self.path is None else self.path
        inside = [tap for tap in taps if tap.startswith(f"{path}.")]
        if inside:
            raise ConfigError(
                f"drop={self.drop}: a loss compares {inside[0]!r}, a layer that may leave; drop one of the two"
            )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Prune) for callback in callbacks):
            raise ConfigError(
                f"drop={self.drop}: another pruner of the same run would lose its place when layers are numbered anew; "
                "drop layers in one run, and prune in a second with start_from"
            )

    @override
    def on_load_checkpoint(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: Any) -> None:
        restore_averages(trainer, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "done": dict(self._done)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step, self._done = state_dict["step"], dict(state_dict["done"])

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        refuse_optimizers(trainer.optimizers)
        if self._step is None:
            self._step = self._resolve(Length.of(trainer))
        self._release = hold_early_stopping(trainer, lambda: self.is_settled)
        self._act_if_due(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._act_if_due(trainer, pl_module)

    def _act_if_due(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self._step is not None
        loop = trainer.fit_loop.epoch_loop
        if self._done or trainer.global_step < self._step or loop._should_accumulate():
            return
        assert self._root is not None
        before = count(self._root)
        with unwrapped(trainer):
            recipe = self._choose(trainer, pl_module, self._root)
            for edit in recipe:
                apply_with_optimizers(self._root, edit, trainer.optimizers, also=averages(trainer))
        self._done = {"step": trainer.global_step, "before": before, "after": count(self._root)}
        for logger in trainer.loggers:
            logger.log_metrics({"student/params": float(self._done["after"])}, step=loop._batches_that_stepped)
        forget_best_if_settled(trainer)
        save_soon(trainer)

    def _choose(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", root: nn.Module) -> Recipe:
        found = example_of(trainer, pl_module, self.example_inputs, samples=self.samples)
        device = next(root.parameters()).device  # the host, where a strategy has put shards together
        inputs: Inputs = map_inputs(found, lambda value: value.to(device) if isinstance(value, Tensor) else value)
        try:
            recipe = drop_by_angular_distance(root, [inputs], drop=self.drop, path=self.path, position=self.position)
        except ValueError as error:
            raise ConfigError(f"drop={self.drop}: {error}") from error
        return Recipe.from_json(first_decides(recipe.to_json()))

    def stages(self) -> list[dict[str, Any]]:
        """Return what was done, as `{method, from_step, to_step, what}`."""
        if not self._done:
            return []
        step, before, after = self._done["step"], self._done["before"], self._done["after"]
        what = f"{self.drop} layers, by angular distance: from {before:,} to {after:,} parameters"
        return [{"method": "drop_layers", "from_step": step, "to_step": step, "what": what}]

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._done:
            rank_zero_warn(f"training ended at step {trainer.global_step}, before layers were dropped")
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._release()
        self._release = nothing
