"""Training samples to calibrate on: always the same ones, in the order of the data set, however the loader shuffles."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_opt.callbacks.network import inputs_of
from lightning_opt.checkpointing.loader import ResumableLoader
from lightning_opt.data.arrays import BatchDataset
from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, map_inputs


def check_enough(trainer: "pl.Trainer", samples: int) -> None:
    """Refuse before training to calibrate on more samples than there are; data without a length are not counted.

    Raises:
        ConfigError: Naming both numbers.
    """
    dataset = _loader(trainer).dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return
    if len(dataset) < samples:
        raise ConfigError(
            f"calibration_samples={samples}: there are {len(dataset)} training samples; ask for at most as many"
        )


def calibration_inputs(trainer: "pl.Trainer", pl_module: "pl.LightningModule", samples: int) -> list[Inputs]:
    """Return the inputs of the first training samples, in batches, on the module's device; no random state moves.

    Args:
        trainer: Has the training data loader.
        pl_module: Says how a batch is read, if it has a task.
        samples: How many; fewer are returned only if there are fewer.
    """
    found: list[Inputs] = []
    left = samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in _batches(_loader(trainer), samples):
            inputs = map_inputs(inputs_of(batch, pl_module), partial(_placed, pl_module=pl_module, left=left))
            found.append(inputs)
            left -= _size(inputs)
            if left <= 0:
                break
    return found


def _placed(value: Any, *, pl_module: "pl.LightningModule", left: int) -> Any:
    return value[:left].to(pl_module.device) if isinstance(value, Tensor) else value


def _size(inputs: Any) -> int:
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else [inputs]
    )
    return len(next(value for value in values if isinstance(value, Tensor)))


def _loader(trainer: "pl.Trainer") -> DataLoader[Any]:
    """Return the loader that the trainer trains from; of several, the first."""
    combined = trainer.fit_loop._combined_loader
    # a fit that had nothing left to do has asked for no loader
    found = combined.flattened if combined is not None else [trainer.fit_loop._data_source.dataloader()]
    loaders = [one for one in found if isinstance(one, DataLoader)]
    if not loaders:
        raise ConfigError(
            "method='post_training' calibrates on training samples, and there is no DataLoader to take them from; use "
            "lightning_opt.quantization.quantize with batches of your own"
        )
    return loaders[0]


def _batches(loader: DataLoader[Any], samples: int) -> Iterator[Any]:
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        yield from loader
        return
    dataset = dataset.plain() if isinstance(dataset, BatchDataset) else dataset
    size = int(loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32)
    collate = loader.collate_fn or default_collate
    keyed = isinstance(loader, ResumableLoader)
    for start in range(0, min(samples, len(dataset)), size):
        places = range(start, min(start + size, samples, len(dataset)))
        keys: list[Any] = [(0, place) for place in places] if keyed else list(places)
        yield collate(
            dataset.__getitems__(keys) if hasattr(dataset, "__getitems__") else [dataset[key] for key in keys]
        )
