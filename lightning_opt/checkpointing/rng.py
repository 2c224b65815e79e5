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
from lightning_opt.checkpointing.loader import data_ranks
from lightning_opt.checkpointing.together import gather

__all__ = ["RngState", "by_rank", "gather", "of_this_rank", "rng_state", "set_rng_state"]

_ANOTHER_ORDER = " that share batches in another way"


class RngState(pl.Callback):
    """Saves python's, numpy's, torch's and the own CUDA device's generators of every rank, and puts them back.

    Acts: when a checkpoint is written, and once after a resume, before the first epoch hook or batch: what runs
    earlier (setting loaders up, a sanity check) draws numbers too. Leaves in a checkpoint: tensors and plain numbers.
    Strategies: all; with another number of ranks the generators cannot be put back and are seeded anew by rank.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._device: torch.device | None = None
        self._trainer: pl.Trainer | None = None
        self._end: Notify | None = None

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._device, self._trainer = trainer.strategy.root_device, trainer

    @override
    def state_dict(self) -> dict[str, Any]:
        return by_rank(rng_state(self._device), trainer=self._trainer)

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
        if (mine := of_this_rank(state, trainer=trainer)) is not None:
            set_rng_state(mine, device=self._device)
            return
        rank_zero_warn(
            f"The checkpoint was written by {len(state['ranks'])} processes and is resumed by {trainer.world_size}"
            f"{_ANOTHER_ORDER if len(state['ranks']) == trainer.world_size else ''}: the random numbers go on from new "
            "seeds, so the run is correct but not the uninterrupted one"
        )
        # by data rank: processes that share one batch must draw the same numbers
        seed_everything_cheaply(mix(torch.initial_seed(), trainer.global_step, data_ranks(trainer)[0]))


def by_rank(value: Any, *, trainer: "pl.Trainer | None") -> dict[str, Any]:
    """Return what every rank passed in, and how the ranks share batches if they do; all ranks must call it."""
    state: dict[str, Any] = {"ranks": gather(value)}
    said = gather(list(data_ranks(trainer)))
    if said != [[rank, len(said)] for rank in range(len(said))]:
        state["data_ranks"] = said
    return state


def of_this_rank(state: dict[str, Any], *, trainer: "pl.Trainer") -> Any:
    """Return what this rank passed to `by_rank`, or None if the processes now share batches in another way."""
    ranks, rank = state["ranks"], trainer.global_rank
    if len(ranks) != trainer.world_size:
        return None
    written = state["data_ranks"][rank] if "data_ranks" in state else [rank, len(ranks)]
    return ranks[rank] if list(written) == list(data_ranks(trainer)) else None


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
