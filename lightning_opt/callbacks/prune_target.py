"""What a pruner works on: the network inside a LightningModule, its weights, and an example of its inputs."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_opt.errors import ConfigError
from lightning_opt.modules import Distillation
from lightning_opt.modules.taps import near_names
from lightning_opt.pruning.patterns import Pattern, inputs_first
from lightning_opt.surgery import apply_with_optimizers
from lightning_opt.surgery.shrink import Shrink

_EVERYTHING = ("*",)
_LOOKUP_TABLES = (nn.Embedding, nn.EmbeddingBag)


def refuse_strategy(trainer: "pl.Trainer", *, shrinks: bool) -> None:
    """Refuse strategies that are not known to leave weights where a pruner finds them.

    Args:
        trainer: Has the strategy.
        shrinks: Whether weights are going to change their shape. Where processes are forked or spawned, Lightning hands
            weights back to a model that nobody has told of that.

    Raises:
        ConfigError: Naming the strategy.
    """
    strategy = trainer.strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(
            f"strategy={type(strategy).__name__}: pruning cannot find the weights that it holds; use strategy=fsdp2, "
            "strategy=ddp or one device"
        )
    if shrinks and isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            f"strategy=ddp_{strategy.launcher._start_method}: its processes cannot hand a smaller model back; use "
            "strategy=ddp, or one device"
        )


def refuse_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse, before training, optimizers whose state could not be cut with the weights: each is tried on a toy.

    Raises:
        ConfigError: Naming the optimizer.
    """
    for optimizer in optimizers:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            toy = nn.Linear(4, 4)
            toy(torch.ones(1, 4)).square().sum().backward()
        try:
            twin = type(optimizer)(toy.parameters(), **optimizer.defaults)
        except (TypeError, ValueError):  # made in a way of its own: the cut itself will say
            continue
        with suppress(TypeError, RuntimeError):  # one that wants a closure
            twin.step()
        apply_with_optimizers(toy, Shrink(kept={"weight": {1: [0, 2]}}, attributes={"": {"in_features": 2}}), twin)


def choose_weights(
    root: nn.Module, *, pattern: Pattern, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, nn.Parameter]:
    """Return the weights that a pattern can prune, by name: trained ones with two dimensions or more.

    Left to itself (`include=("*",)`) it takes weights of layers, but neither lookup tables nor single parameters such
    as position embeddings; patterns that name those take them too.

    Args:
        root: The network.
        pattern: Must fit each of them.
        include: Names of weights or of the modules around them; `*` stands for anything, dots too.
        exclude: Likewise, of what stays dense.

    Raises:
        ConfigError: A name matches nothing (near names are listed), nothing is left, or the pattern does not fit.
    """
    weights = {n: p for n, p in root.named_parameters() if p.dim() >= 2 and p.requires_grad}
    check_names("include", include, list(weights))
    check_names("exclude", exclude, list(weights))
    everything = tuple(include) == _EVERYTHING
    skipped = _no_layer_weights(root) if everything else set()
    chosen = {
        name: weight
        for name, weight in weights.items()
        if name not in skipped and matches(name, include) and not matches(name, exclude)
    }
    if not chosen:
        raise ConfigError(
            f"include={list(include)!r}, exclude={list(exclude)!r}: no weight of {type(root).__name__} is left to "
            f"prune; it has {', '.join(list(weights)[:5]) or 'none'}"
        )
    return _fitting(chosen, pattern, turned=inputs_first(root), skip_narrow=everything)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any pattern fits a weight's name or that of a module around it."""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(one, pattern) for pattern in patterns for one in around)


def check_names(argument: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a pattern that fits no name.

    Raises:
        ConfigError: Naming the argument and the pattern, with near names.
    """
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ConfigError(
                f"{argument}={pattern!r} matches none of what can be pruned; near names: "
                f"{', '.join(near_names(pattern, names)) or 'none'}"
            )


def _no_layer_weights(root: nn.Module) -> set[str]:
    """Return the names of lookup tables and of parameters that are no layer's weight."""
    tables = {id(m.weight) for m in root.modules() if isinstance(m, _LOOKUP_TABLES)}
    return {n for n, p in root.named_parameters() if id(p) in tables or "weight" not in n.rpartition(".")[2]}


def _fitting(
    weights: Mapping[str, nn.Parameter], pattern: Pattern, *, turned: Collection[str], skip_narrow: bool
) -> dict[str, nn.Parameter]:
    """Return the weights that a pattern fits; those with fewer inputs than one of its units stay dense.

    Raises:
        ConfigError: The pattern does not fit a weight, or none.
    """
    fitting, narrow = {}, []
    unit = int(getattr(pattern, "m", getattr(pattern, "cols", 1)))
    for name, weight in weights.items():
        if skip_narrow and weight.shape[1] < unit:
            narrow.append(name)
            continue
        shape = weight.shape
        if name in turned:
            shape = torch.Size([shape[1], shape[0], *shape[2:]])
        try:
            pattern.check(name, shape)
        except ValueError as error:
            raise ConfigError(f"pattern={pattern}: {error}; leave it dense with exclude=[{name}]") from error
        fitting[name] = weight
    if not fitting:
        raise ConfigError(
            f"pattern={pattern}: all of {', '.join(narrow[:5])} have fewer than {unit} inputs; choose another pattern"
        )
    if narrow:
        rank_zero_info(f"pattern={pattern}: {', '.join(narrow)} stay dense, with fewer than {unit} inputs")
    return fitting


def taps_of(pl_module: "pl.LightningModule") -> list[str]:
    """Return the names of the modules of the network whose answers a loss compares with a teacher's."""
    if not isinstance(pl_module, Distillation):
        return []
    return list(dict.fromkeys(pattern for term in pl_module._each_term() for pattern in term.loss.student_taps))
