"""One fit's quantization-aware training: what happens at each moment, and after each batch."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_opt.callbacks.compiled import is_compiled
from lightning_opt.callbacks.neighbours import averaged_roots, nothing, save_soon
from lightning_opt.callbacks.quantize_averages import follow, is_of_weight, keep_following, start_scales, watch_weights
from lightning_opt.callbacks.quantize_ranks import Reducer, average_gradients, whole_weights
from lightning_opt.callbacks.quantize_timeline import Phases
from lightning_opt.quantization.quantizer import FakeQuantizer, calibrating
from lightning_opt.quantization.state import (
    freeze_batch_norm,
    freeze_observers,
    quantizers,
    set_observing,
    switch_on,
)
from lightning_opt.surgery import recipe_of


class Quantizing:
    """Switches the quantizers of one fit on and freezes them when that is due.

    Args:
        trainer: Its optimizers are made, and restored after a stop.
        root_name: Where the quantized network is in the LightningModule.
        root: The network; its quantizers are inserted.
        phases: When.
    """

    def __init__(self, trainer: "pl.Trainer", *, root_name: str, root: nn.Module, phases: Phases) -> None:
        self.trainer, self.root_name, self.root, self.phases = trainer, root_name, root, phases
        self.step = trainer.global_step - 1  # the moment "0 steps" is still to come
        self._watching = ExitStack()
        self._undo = nothing
        self._reducer: Reducer | None = None
        self._reduced: list[FakeQuantizer] = []
        self._scales: list[nn.Parameter] = []
        self._holds_batch_norm = False

    @property
    def is_settled(self) -> bool:
        """Whether the grids of activations are final."""
        return self.phases.is_settled(self.step)

    def attach(self) -> None:
        """Put all quantizers into the state that belongs to the present step."""
        self._undo = keep_following(self.trainer, self.root_name, self.root)
        self._set_flags()

    def detach(self) -> None:
        """Take all hooks away."""
        self._watching.close()
        self._undo()
        self._undo = nothing

    def before_batch(self) -> None:
        """Have quantizers that are still switched off look at the batch."""
        if self.phases.observes(self.step) and not self.phases.is_on(self.step):
            self._watching.enter_context(calibrating())
        if self._holds_batch_norm and getattr(self.trainer.fit_loop, "_skip_backward", False):
            # the epoch that stochastic weight averaging adds, to find the statistics of the averaged weights
            freeze_batch_norm(self.root, False)
            watch_weights(self.root)
            self._holds_batch_norm = False

    def after_batch(self) -> None:
        """Make what the ranks have seen one."""
        self._watching.close()
        if self._reducer is not None:
            self._reducer.reduce()
            if self.phases.is_on(self.step):
                for quantizer in self._reduced:
                    quantizer.fit()

    def after_backward(self) -> None:
        """Make the gradients of learned scales, which DDP leaves alone, one."""
        if self._scales and self.phases.is_on(self.step) and self._is_last_of_step():
            average_gradients(self._scales)

    def _is_last_of_step(self) -> bool:
        automatic = self.trainer.lightning_module.automatic_optimization
        return not automatic or not self.trainer.fit_loop._should_accumulate()

    def advance(self, step: int) -> bool:
        """Do what is due after `step` optimizer steps.

        Returns:
            Whether something changed.
        """
        before, self.step = self.step, step
        at = self.phases
        moments = {at.observe, at.start, at.freeze_observers, at.freeze_batch_norm}
        due = {moment for moment in moments if moment is not None and before < moment <= step}
        if at.start in due:
            self._switch_on()
        if at.freeze_observers in due:
            self._freeze()
        if due:
            self._set_flags()
        return bool(due)

    def _switch_on(self) -> None:
        if not any(edit.op == "quantize_on" for edit in recipe_of(self.root)):
            with whole_weights(self.trainer.lightning_module, quantizers(self.root)):
                switch_on(self.root)
            for copy in self._averages():
                switch_on(copy)
                follow(self.root, copy)
                start_scales(self.root, copy)
        save_soon(self.trainer)

    def _freeze(self) -> None:
        with whole_weights(self.trainer.lightning_module, quantizers(self.root)):
            freeze_observers(self.root)
        for copy in self._averages():
            freeze_observers(copy)
            follow(self.root, copy)
        unseen = [name for name, quantizer in quantizers(self.root).items() if not quantizer.is_fitted]
        if unseen:
            rank_zero_warn(
                f"{len(unseen)} quantizers have seen no values until freeze_observers, first {unseen[0]!r}: exclude "
                "layers that training does not use, or the model cannot be converted"
            )

    def _averages(self) -> list[nn.Module]:
        return averaged_roots(self.trainer, self.root_name)

    def _watched(self) -> list[FakeQuantizer]:
        found = quantizers(self.root).items()
        return [q for name, q in found if q.observing and q.observer is not None and not is_of_weight(name)]

    def _set_flags(self) -> None:
        """Tell quantizers and batch norms what the present step asks of them."""
        observes, on = self.phases.observes(self.step), self.phases.is_on(self.step)
        holds = self.phases.holds_batch_norm(self.step)
        for root in (self.root, *self._averages()):
            set_observing(root, observes)
            for quantizer in quantizers(root).values():
                quantizer.observing &= not (quantizer.learnable and on)  # learned scales are found once
            if holds != self._holds_batch_norm:
                freeze_batch_norm(root, holds)
        self._holds_batch_norm = holds
        if self.trainer.world_size > 1:
            self._reduced = self._watched()
            self._reducer = Reducer(self._reduced) if self._reduced else None
            self._scales = self._scales_to_average()
        if is_compiled(self.trainer.lightning_module):
            torch.compiler.reset()  # else it might run out of recompilations

    def _scales_to_average(self) -> list[nn.Parameter]:
        """Return learned scales whose gradients nobody else reduces: FSDP2 does it for those that it shards."""
        found: list[Any] = [q.scale for q in quantizers(self.root).values() if q.learnable and q.scale.requires_grad]
        return [scale for scale in found if not hasattr(scale, "device_mesh")]

    def stages(self, how: str) -> list[dict[str, Any]]:
        """Return what was done so far, as `{method, from_step, to_step, what}`.

        Args:
            how: The scheme in a few words.
        """
        at = self.phases
        if self.step < at.start:
            return []
        layers = sum(is_of_weight(name) for name in quantizers(self.root))
        what = f"{how}: quantization-aware training, {layers} weights"
        if self.step >= at.freeze_observers:
            what += f", ranges of activations fixed at step {at.freeze_observers}"
        return [{"method": "quantize", "from_step": at.start, "to_step": self.step, "what": what}]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {"phases": self.phases.to_state(), "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.step = state["step"]
