"""Weights that a strategy has spread over processes: how a callback finds them, and has them whole for a moment."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_opt.strategies import PipelineStrategy


def is_pipeline(strategy: Any) -> bool:
    """Whether a strategy gives each process some of the layers."""
    return isinstance(strategy, PipelineStrategy)


def is_spread(strategy: Any) -> bool:
    """Whether a strategy leaves no process with all weights."""
    return isinstance(strategy, ModelParallelStrategy) or is_pipeline(strategy)


def settle_shards(pl_module: nn.Module) -> None:
    """Have FSDP2 show the shards, which optimizers know, where a forward has left whole weights in their place."""
    for module in pl_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def whole_weights(pl_module: nn.Module) -> Iterator[None]:
    """Have each process hold all weights of what FSDP2 shards; all processes must enter it at the same time."""
    sharded = [module for module in pl_module.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    yield
    for module in sharded:
        module.reshard()


@contextmanager
def unwrapped(trainer: "pl.Trainer") -> Iterator[None]:
    """Take the strategy's wrappers away while a network's shapes change, and put new ones around it afterwards.

    DDP's buckets have the old shapes. Of what FSDP2 shards each process has, meanwhile, all weights and all of the
    optimizers' state, on the host: parameters are other objects afterwards, and the optimizers know them.
    """
    strategy: Any = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        with _gathered(strategy, trainer.lightning_module, trainer.optimizers):
            yield
        return
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        strategy.model = strategy.model.module
    yield
    if wrapped:
        strategy.configure_ddp()


@contextmanager
def _gathered(strategy: Any, pl_module: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    settle_shards(pl_module)
    before = dict(pl_module.named_parameters())
    strategy.gather(pl_module)
    whole = dict(pl_module.named_parameters())
    _exchange(optimizers, {parameter: whole[name] for name, parameter in before.items()})
    yield
    whole = dict(pl_module.named_parameters())
    strategy.parallelize(pl_module)
    strategy.model_to_device()
    if strategy._spread is not None:
        strategy._spread.settle()
    settle_shards(pl_module)
    after = dict(pl_module.named_parameters())
    _exchange(optimizers, {parameter: after[name] for name, parameter in whole.items()})


@torch.no_grad()
def _exchange(optimizers: Sequence[Optimizer], new: Mapping[Tensor, nn.Parameter]) -> None:
    """Have optimizers train other parameters in the place of those that they have, with the same state."""
    for optimizer in optimizers:
        states = dict(optimizer.state)
        for group in optimizer.param_groups:
            group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]
        optimizer.state.clear()
        for parameter, state in states.items():
            other = new.get(parameter, parameter)
            optimizer.state[other] = {key: _like(other, parameter, value) for key, value in state.items()}


def _like(new: Any, old: Any, value: Any) -> Any:
    """Spread a state tensor as its parameter is spread now, or put it together."""
    if isinstance(value, DTensor):
        value = value.full_tensor().to(new.device)
    if isinstance(new, DTensor) and isinstance(value, Tensor) and value.shape == old.shape:
        there = value.to(new.to_local().device)
        return distribute_tensor(there, new.device_mesh, new.placements, src_data_rank=None)
    return value
