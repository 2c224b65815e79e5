"""What callbacks that change a model over a training have in common: their state in a checkpoint, and their end."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from typing_extensions import override

from lightning_opt.callbacks.neighbours import nothing, restore_averages
from lightning_opt.errors import ConfigError


class ModelChange(pl.Callback):
    """The base of `Prune` and `Quantize`.

    A subclass makes `_run` when training starts; it has `state_dict()` and `detach()`.

    Attributes:
        keeps: What a checkpoint loses if it was written with another key, and what has to stay as it was.
    """

    keeps: ClassVar[str] = ""

    def __init__(self, **key: Any) -> None:
        self._run: Any = None
        self._loaded: Mapping[str, Any] | None = None
        self._settled = False
        self._release = nothing
        # Lightning asks for the key at each hook of each step.
        self._state_key = self._generate_state_key(**key)

    @property
    def is_settled(self) -> bool:
        """Whether the model has its final form."""
        return self._settled

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    @property
    def _needs_state(self) -> bool:
        """Whether a resumed training goes on from what a checkpoint holds."""
        return True

    @override
    def on_load_checkpoint(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: Any) -> None:
        restore_averages(trainer, checkpoint)
        states = checkpoint.get("callbacks", {})
        others = [key for key in states if key.startswith(type(self).__qualname__)]
        if trainer.state.fn == "fit" and self._needs_state and others and self.state_key not in states:
            raise ConfigError(
                f"the checkpoint was written with {', '.join(others)}, and this run has {self.state_key}: {self.keeps}"
            )

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None
        self._settled = state_dict.get("settled", self._settled)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._run is None else {**self._run.state_dict(), "settled": self._settled}

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._end()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._run is not None:
            self._run.detach()
        self._release()
        self._release = nothing
