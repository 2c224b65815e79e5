"""Quantizers on several processes: which strategies there may be, what is reduced, and weights that are in parts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_opt.callbacks import shards
from lightning_opt.errors import ConfigError
from lightning_opt.quantization.quantizer import FakeQuantizer

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def refuse_strategy(trainer: "pl.Trainer", *, method: str) -> None:
    """Refuse strategies under which quantizers could not be the same on all ranks.

    Args:
        trainer: Has the strategy.
        method: "qat" or "post_training"; the latter needs whole weights.

    Raises:
        ConfigError: Naming the strategy.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if shards.is_pipeline(strategy):
        raise ConfigError(
            "strategy=pipeline: each process has some of the layers, and quantizers are made for all of them; use "
            "strategy=fsdp2, strategy=ddp or one device"
        )
    if isinstance(strategy, ModelParallelStrategy):
        if method != "qat":
            raise ConfigError(
                f"strategy={name}: method={method!r} needs whole weights on each device; use method='qat', or quantize "
                "the trained model on one device"
            )
        if strategy._tensor_parallel_size not in (1, "auto") or strategy._data_parallel_size == 1 < trainer.world_size:
            raise ConfigError(
                f"strategy={name}: tensor_parallel_size={strategy._tensor_parallel_size}: layers that are split "
                "between devices cannot be quantized; shard with data_parallel_size alone"
            )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise ConfigError(f"strategy={name}: quantization knows one device, ddp and FSDP2 (ModelParallelStrategy)")
    elif isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(
            f"strategy=ddp_{strategy.launcher._start_method}: its processes cannot hand a quantized model back; use "
            "strategy=ddp, or one device"
        )
    if method == "qat" and getattr(strategy, "_layer_sync", None) is not None:
        raise ConfigError(
            "trainer.sync_batchnorm=true: it replaces the batch norms that are folded into convolutions; switch it off"
        )


def keep_out_of_ddp(pl_module: nn.Module, found: Iterable[FakeQuantizer]) -> None:
    """Have DDP leave quantizers alone: scales get no gradient before they are used, and are reduced here."""
    ours = {id(tensor) for quantizer in found for tensor in (*quantizer.parameters(), *quantizer.buffers())}
    named = [*pl_module.named_parameters(), *pl_module.named_buffers()]
    names = [name for name, tensor in named if id(tensor) in ours]
    known = list(getattr(pl_module, _IGNORED, []))
    setattr(pl_module, _IGNORED, [*known, *(name for name in names if name not in known)])


class Reducer:
    """Makes what the observers of all ranks have seen one: with one collective for all of them, two with histograms.

    Args:
        found: The quantizers whose observers are in use; the same ones on all ranks.
    """

    def __init__(self, found: Sequence[FakeQuantizer]) -> None:
        pairs = [pair for q in found if q.observer is not None for pair in q.observer.reductions()]
        self._gathered = [(tensor, how) for tensor, how in pairs if how != "sum"]
        self._summed = [tensor for tensor, how in pairs if how == "sum"]
        # Sums grow over the steps: only what is new on each rank is added up.
        self._before = [tensor.clone() for tensor in self._summed]

    @torch.no_grad()
    def reduce(self) -> None:
        """Reduce in place; all ranks must call it."""
        if self._gathered:
            self._reduce_small()
        if self._summed:
            new = [now - old for now, old in zip(self._summed, self._before, strict=True)]
            flat = torch.cat([tensor.reshape(-1) for tensor in new])
            torch.distributed.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in new])
            for tensor, old, part in zip(self._summed, self._before, parts, strict=True):
                old.add_(part.view_as(old))
                tensor.copy_(old)

    def _reduce_small(self) -> None:
        flat = torch.cat([tensor.reshape(-1).double() for tensor, _ in self._gathered])
        ranks = flat.new_empty(torch.distributed.get_world_size() * flat.numel())
        torch.distributed.all_gather_into_tensor(ranks, flat)
        ranks = ranks.view(-1, flat.numel())
        merged = {"min": ranks.amin(0), "max": ranks.amax(0), "mean": ranks.mean(0)}
        start = 0
        for tensor, how in self._gathered:
            end = start + tensor.numel()
            tensor.copy_(merged[how][start:end].view_as(tensor))
            start = end


@torch.no_grad()
def average_gradients(scales: Sequence[Tensor]) -> None:
    """Give learned scales the mean of all ranks' gradients, in one collective; all ranks must call it."""
    if not scales:
        return
    gradients = [torch.zeros_like(s) if s.grad is None else s.grad for s in scales]
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.div_(torch.distributed.get_world_size()).split([s.numel() for s in scales])
    for scale, gradient, part in zip(scales, gradients, parts, strict=True):
        scale.grad = gradient.copy_(part.view_as(gradient))


@contextmanager
def whole_weights(pl_module: nn.Module, found: Mapping[str, FakeQuantizer]) -> Iterator[None]:
    """Have each rank hold all weights of what FSDP2 shards, and keep what is then written into learned scales.

    All ranks must enter it at the same time. Where nothing is sharded it does nothing.
    """
    with shards.whole_weights(pl_module):
        yield
        # Where nothing is sharded these are no DTensors below, and stay what they are.
        written = {name: quantizer.scale.detach().clone() for name, quantizer in found.items() if quantizer.learnable}
    for name, value in written.items():
        scale: Any = found[name].scale
        if isinstance(scale, DTensor):
            part: Any = distribute_tensor(value, scale.device_mesh, scale.placements, src_data_rank=None)
            scale.to_local().detach().copy_(part.to_local())
