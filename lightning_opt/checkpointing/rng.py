"""The random number generators of a run, so that a resumed one draws the numbers that the uninterrupted one drew."""

import random
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_opt.checkpointing.boundary import Notify, observe
from lightning_opt.checkpointing.keys import mix, seed_everything_cheaply


class RngState(pl.Callback):
    """Saves python's, numpy's, torch's and the own CUDA device's generators of every rank, and puts them back.

    Acts: when a checkpoint is written, and once after a resume, before the first epoch hook or batch: what runs
    earlier (setting loaders up, a sanity check) draws numbers too. Leaves in a checkpoint: tensors and plain numbers.
    Strategies: all; with another number of ranks the generators cannot be put back and are seeded anew by rank.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._device: torch.device | None = None
        self._end: Notify | None = None

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._device = trainer.strategy.root_device

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ranks": gather(rng_state(self._device))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._pending = state_dict

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._pending is not None:
            self._end = observe(trainer, before_epoch=lambda: self._restore(trainer))

    def _restore(self, trainer: "pl.Trainer") -> None:
        if self._end is not None:
            self._end()
        state, self._pending, self._end = self._pending, None, None
        if state is None:
            return
        ranks, rank, world_size = state["ranks"], trainer.global_rank, trainer.world_size
        if len(ranks) == world_size:
            set_rng_state(ranks[rank], device=self._device)
            return
        rank_zero_warn(
            f"The checkpoint was written by {len(ranks)} processes and is resumed by {world_size}: the random numbers "
            "go on from new seeds, so the run is correct but not the uninterrupted one"
        )
        seed_everything_cheaply(mix(torch.initial_seed(), trainer.global_step, rank))


def rng_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of the global generators (and of a CUDA device's) as tensors and plain numbers."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], *, device: torch.device | None = None) -> None:
    """Put the generators back to what `rng_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def gather(value: Any) -> list[Any]:
    """Return what every rank passed in, by rank; all ranks must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
