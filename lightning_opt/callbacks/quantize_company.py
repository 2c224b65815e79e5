"""Other callbacks of a training that change the network too: what must come before quantizers are switched on."""

from collections.abc import Iterator

import lightning.pytorch as pl
from torch import nn

from lightning_opt.callbacks.moments import Length
from lightning_opt.callbacks.network import find_root
from lightning_opt.callbacks.prune import Prune
from lightning_opt.callbacks.prune_depth import PruneDepth
from lightning_opt.errors import ConfigError


def refuse_late_cuts(trainer: "pl.Trainer", root: nn.Module, *, start: int) -> None:
    """Refuse callbacks that would cut a network whose quantizers are switched on.

    Raises:
        ConfigError: Naming both moments.
    """
    for name, step in _cuts(trainer, root):
        if step >= start:
            raise ConfigError(
                f"{name} is step {step} and quantizers are switched on at step {start}: what is removed must be gone "
                "before; give quantizer.start a later moment or the pruner an earlier one"
            )


def _cuts(trainer: "pl.Trainer", root: nn.Module) -> Iterator[tuple[str, int]]:
    length = Length.of(trainer)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if not isinstance(callback, Prune | PruneDepth):
            continue
        if find_root(trainer.lightning_module, callback.module)[1] is not root:
            continue
        if isinstance(callback, PruneDepth):
            yield f"at={callback._at.written!r}", callback._resolve(length)
        elif callback.when.shrink is not None:
            yield f"shrink_at={callback.when.shrink.written!r}", callback.when.shrink.to_steps(length)


def refuse_twins(trainer: "pl.Trainer", kind: type[pl.Callback], root: nn.Module) -> None:
    """Refuse two quantizers of one network.

    Raises:
        ConfigError: There are.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = [c for c in callbacks if isinstance(c, kind)]
    same = [c for c in ours if find_root(trainer.lightning_module, getattr(c, "module", None))[1] is root]
    if len(same) > 1:
        raise ConfigError(
            "two Quantize callbacks work on the same network: give layers that differ rules of one Scheme, or name "
            "two networks with module="
        )
