"""Quantize while training, or after it."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_opt.callbacks.change import ModelChange
from lightning_opt.callbacks.moments import Length
from lightning_opt.callbacks.neighbours import (
    forget_best_if_settled,
    hold_early_stopping,
    nothing,
)
from lightning_opt.callbacks.network import example_of, find_root
from lightning_opt.callbacks.quantize_arguments import Improvement, Method, What
from lightning_opt.callbacks.quantize_averages import refuse_learned
from lightning_opt.callbacks.quantize_company import refuse_late_cuts, refuse_twins
from lightning_opt.callbacks.quantize_insert import (
    insert,
    insert_into_averages,
    inserted_scheme,
    try_insert,
    warn_of,
)
from lightning_opt.callbacks.quantize_post_training import PostTraining
from lightning_opt.callbacks.quantize_ranks import keep_out_of_ddp, refuse_strategy
from lightning_opt.callbacks.quantize_run import Quantizing
from lightning_opt.callbacks.quantize_timeline import Phases, When
from lightning_opt.checkpointing.recipe import install
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import quantizers


class Quantize(ModelChange):
    """Trains a model with its weights and activations rounded to few bits, or rounds them when training is over.

    Acts, with `method="qat"`: in `setup` quantizers are inserted, switched off, before weights are restored. In the 16
    steps before `start` they only look at activations; at `start` they round; at `freeze_observers` ranges become
    final, and at `freeze_batch_norm` the statistics of batch norms. Nothing is observed in validation or in the sanity
    check. Until ranges are final early stopping is held back and no checkpoint counts as best. The model stays in
    float, with rounded values: `export` makes integers of it.

    Acts, with `method="post_training"`: in `on_fit_end` the best weights are loaded, ranges are found on training
    samples, and `checkpoint_path` names the checkpoint of the quantized model.

    Leaves in a checkpoint: quantizers under names of their own beside the weights, whose names stay as they are; the
    moments in steps; the recipe of what was inserted and switched on. A run that is stopped anywhere and resumed ends
    bit-equal.

    Strategies: one device and ddp; FSDP2 (ModelParallelStrategy, without tensor parallelism) for "qat". All ranks have
    the same quantizers: what they observe is reduced in one collective a step.

    Args:
        scheme: How many bits and what for: a `Scheme`, or its short name such as "w8a8", "w4a8", "w8a8_dynamic", "w8".
        method: "qat" or "post_training".
        start: Moment at which quantizers are switched on: a share of all optimizer steps, or text such as "120 steps"
            or "3 epochs"; after the first step at the earliest.
        freeze_observers: Moment from which ranges of activations stay.
        freeze_batch_norm: Moment from which batch norms keep their statistics; None: never.
        calibration_samples: Training samples, in the order of the data set, that post-training ranges are found on.
        improve: Post-training improvements, such as `SmoothQuant()`, in order.
        max_drop: Post-training: layers that cost most stay in more bits until the monitored validation metric is at
            most this much worse.
        exclude: Names of layers that stay in float; `*` stands for anything.
        module: Name of the network inside the LightningModule; found when not given.
        example_inputs: To trace the network with; the data module's when not given.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    _run: Quantizing | None
    keeps = "when what is frozen would be lost; keep module as it was"

    def __init__(
        self,
        scheme: Scheme | str = "w8a8",
        *,
        method: Method = "qat",
        start: float | str = 0.5,
        freeze_observers: float | str = 0.8,
        freeze_batch_norm: float | str | None = 0.8,
        calibration_samples: int = 512,
        improve: Sequence[Improvement] = (),
        max_drop: float | None = None,
        exclude: Sequence[str] = (),
        module: str | None = None,
        example_inputs: Inputs | None = None,
    ) -> None:
        self.what = What.read(
            scheme,
            method=method,
            calibration_samples=calibration_samples,
            improve=improve,
            max_drop=max_drop,
            exclude=exclude,
        )
        self.when = When.read(start=start, freeze_observers=freeze_observers, freeze_batch_norm=freeze_batch_norm)
        self.module, self.example_inputs = module, example_inputs
        self.checkpoint_path: str | None = None
        self._root_name = ""
        self._root: nn.Module | None = None
        self._after: PostTraining | None = None
        super().__init__(module=module)
        self._settled = not self.what.trains

    @property
    def _needs_state(self) -> bool:
        return self.what.trains

    @property
    def phases(self) -> Phases:
        """The moments as optimizer steps; known once training has started.

        Raises:
            RuntimeError: It has not.
        """
        if self._run is None:
            raise RuntimeError("the phases are known once training has started")
        return self._run.phases

    def check(self, network: nn.Module, *, example_inputs: Inputs | None = None, length: Length | None = None) -> None:
        """Refuse before training what does not fit a network or a training; nothing is changed.

        Args:
            network: What would be quantized.
            example_inputs: To trace it with; without them the network is not looked at.
            length: Of the training; without it moments are not looked at.

        Raises:
            ConfigError: Naming the argument and the value.
        """
        inputs = self.example_inputs if example_inputs is None else example_inputs
        if inputs is not None:
            try_insert(network, inputs, self.what.scheme, exclude=self.what.exclude)
        if length is not None and self.what.trains:
            self.when.resolve(length)

    def stages(self) -> list[dict[str, Any]]:
        """Return what was done, as `{method, from_step, to_step, what}`."""
        if self._after is not None:
            return self._after.stages(str(self.what))
        return [] if self._run is None else self._run.stages(str(self.what))

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        refuse_strategy(trainer, method=self.what.method)
        install(pl_module)
        self._root_name, self._root = find_root(pl_module, self.module)
        if stage != "fit":
            return
        self._run, self._after, self._loaded = None, None, None
        self._settled = not self.what.trains
        if self.what.trains:
            self._insert(trainer, pl_module, self._root)
        else:
            self._after = PostTraining(self.what, root_name=self._root_name, example_inputs=self.example_inputs)

    def _insert(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", root: nn.Module) -> None:
        inserted = inserted_scheme(root)
        if inserted is None:
            inputs = example_of(trainer, pl_module, self.example_inputs)
            warn_of(insert(root, inputs, self.what.scheme, exclude=self.what.exclude))
        elif inserted != self.what.scheme:
            raise ConfigError(f"scheme={self.what.name}: the model is quantized already, by another scheme")
        insert_into_averages(trainer, self._root_name, root)
        keep_out_of_ddp(pl_module, quantizers(root).values())

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        assert self._root is not None
        refuse_twins(trainer, Quantize, self._root)
        if self._after is not None:
            self._after.check(trainer, pl_module)
            return
        self._run = self._make_run(trainer)
        refuse_late_cuts(trainer, self._root, start=self._run.phases.start)
        refuse_learned(trainer, self._root)
        self._release = hold_early_stopping(trainer, lambda: self.is_settled)
        self._run.attach()
        self._advance(trainer)

    def _make_run(self, trainer: "pl.Trainer") -> Quantizing:
        assert self._root is not None
        loaded, self._loaded = self._loaded, None
        phases = Phases(**loaded["phases"]) if loaded else self.when.resolve(Length.of(trainer))
        run = Quantizing(trainer, root_name=self._root_name, root=self._root, phases=phases)
        if loaded:
            run.load_state_dict(loaded)
        return run

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.before_batch()

    @override
    def on_after_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._run is not None:
            self._run.after_backward()

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._run is not None:
            self._run.after_batch()
            if trainer.global_step != self._run.step:
                self._advance(trainer)

    def _advance(self, trainer: "pl.Trainer") -> None:
        assert self._run is not None
        self._run.advance(trainer.global_step)
        if not self._settled and self._run.is_settled:
            self._settled = True
            forget_best_if_settled(trainer)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._run is not None and not self._settled:
            rank_zero_warn(
                f"training ended at step {trainer.global_step}, before ranges were final (freeze_observers is step "
                f"{self._run.phases.freeze_observers})"
            )
        self._release()
        self._release = nothing

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._after is not None:
            self.checkpoint_path = self._after.act(trainer, pl_module)
        elif self._run is None and self._loaded is not None:  # there was nothing left to train
            self._run = self._make_run(trainer)
