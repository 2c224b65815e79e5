"""Which callback goes with which strategy, said before anything starts."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_opt.callbacks.shards import is_pipeline
from lightning_opt.errors import ConfigError

_OF_INPUTS = frozenset({"input_norm", "gram", "output_norm"})
_ONE = "use strategy=ddp or one device"


def check_pair(strategy: Any, callback: pl.Callback) -> None:
    """Refuse a callback that a strategy cannot be combined with; neither needs a trainer or a process group.

    Args:
        strategy: A `Strategy`, or its short name: those are looked at when the trainer has made one of it.
        callback: Any callback; most go with everything.

    Raises:
        ConfigError: Naming the strategy and the callback's argument.
    """
    from lightning_opt.callbacks.prune import Prune  # they ask this module
    from lightning_opt.callbacks.prune_depth import PruneDepth
    from lightning_opt.callbacks.quantize import Quantize

    if is_pipeline(strategy):
        what = "each process has some of the layers"
    elif isinstance(strategy, ModelParallelStrategy):
        what = "each layer is shared by several processes" if splits_layers(strategy) else ""
    else:
        return
    if isinstance(callback, Prune):
        _check_prune(strategy, callback, what)
    elif isinstance(callback, PruneDepth) and what:
        raise _refused(strategy, f"drop={callback.drop}", f"{what}, and which layers matter is found on whole ones")
    elif isinstance(callback, PruneDepth):
        _check_gathers(strategy, f"drop={callback.drop}")
    elif isinstance(callback, Quantize):
        if what:
            raise _refused(strategy, f"Quantize scheme={callback.what.name}", f"{what}, and quantizers need whole ones")
        if not callback.what.trains:
            why = "it needs whole weights on each device; use method='qat', or quantize the trained model on one device"
            raise ConfigError(f"strategy={name_of(strategy)}: method='post_training': {why}")


def _check_prune(strategy: Any, callback: Any, what: str) -> None:
    rules = callback.what
    if rules.can_shrink:
        if what:
            raise _refused(strategy, f"pattern={rules.pattern!r}", f"{what}, and structures run through whole ones")
        _check_gathers(strategy, f"pattern={rules.pattern!r}")
        return
    if not what:
        return
    reads = rules.solver or rules.criterion
    if reads is not None and reads.needs & _OF_INPUTS:
        argument = "solver" if rules.solver is not None else "criterion"
        raise _refused(strategy, f"{argument}={reads!r}", f"{what}, and it reads the inputs of whole ones")
    if not is_pipeline(strategy):
        return
    if rules.criterion is not None and rules.criterion.needs and not rules.criterion.elementwise:
        raise _refused(strategy, f"criterion={rules.criterion!r}", f"{what}, and it looks at whole weights")
    if callback.penalty:
        raise _refused(strategy, f"penalty={callback.penalty}", f"{what}, perhaps without a batch norm")
    if callback.schedule.rewind_points:
        raise _refused(strategy, f"schedule={callback.schedule!r}", f"{what}, and all of them are rewound together")


def _check_gathers(strategy: Any, argument: str) -> None:
    if not hasattr(strategy, "gather"):
        raise _refused(strategy, argument, "it does not give weights back while their shapes change", "strategy=fsdp2")


def splits_layers(strategy: ModelParallelStrategy) -> bool:
    """Whether a strategy is told to split single layers between processes."""
    asked: dict[str, Any] = getattr(strategy, "_asked", {})
    tensor, data = strategy._tensor_parallel_size, strategy._data_parallel_size
    if isinstance(tensor, int):
        return tensor != 1
    return asked.get("tensor", 1) != 1 if asked else data == 1


def name_of(strategy: Any) -> str:
    """Return what a strategy is called in a config, as far as it is one of ours; else its class."""
    if is_pipeline(strategy):
        return "pipeline"
    if isinstance(strategy, ModelParallelStrategy) and hasattr(strategy, "gather"):
        if not splits_layers(strategy):
            return "fsdp2"
        asked: dict[str, Any] = getattr(strategy, "_asked", {})
        return "tensor_parallel" if asked.get("data") == 1 else "fsdp2_tp"
    return type(strategy).__name__


def _refused(strategy: Any, argument: str, why: str, instead: str = _ONE) -> ConfigError:
    how = instead if instead.startswith("use") else f"use {instead}"
    return ConfigError(f"strategy={name_of(strategy)} does not go with {argument}: {why}; {how}")
