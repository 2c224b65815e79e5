"""How far a run is: a bar on a terminal, plain lines in a file."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

_log = logging.getLogger("lightning_opt")


def progress(*, every_n_seconds: float = 10.0) -> pl.Callback:
    """Return a bar where somebody watches, else a callback that logs a line now and then.

    Args:
        every_n_seconds: At most one line in this time, and one at the end.
    """
    return RichProgressBar(leave=False) if sys.stderr.isatty() else PlainProgress(every_n_seconds=every_n_seconds)


class PlainProgress(pl.Callback):
    """Log the epoch and the last validation values as one line.

    Acts at the end of training epochs; leaves nothing in a checkpoint; works with every strategy.

    Args:
        every_n_seconds: At most one line in this time, and one after the last epoch.
    """

    def __init__(self, *, every_n_seconds: float = 10.0) -> None:
        self.every_n_seconds = every_n_seconds
        self._last = 0.0

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        now = time.monotonic()
        is_last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if is_last or now - self._last >= self.every_n_seconds:
            self._last = now
            end = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
            _log.info("  epoch %d%s  %s", trainer.current_epoch + 1, end, _values(trainer.callback_metrics))


def _values(metrics: Mapping[str, Any]) -> str:
    shown = [name for name in metrics if name.startswith("val/") or name == "train/loss"]
    return "  ".join(f"{name} {float(metrics[name]):.4f}" for name in shown[:4])
