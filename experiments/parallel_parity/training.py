"""One small distillation, in one process or spread over several, and what each process saw."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import TensorDataset

from lightning_opt.callbacks import Prune, Quantize
from lightning_opt.checkpointing import train_loader
from lightning_opt.errors import ConfigError
from lightning_opt.losses import KD, HiddenStates, Term
from lightning_opt.models import TextEncoder
from lightning_opt.modules import Distillation
from lightning_opt.quantization.state import quantizers
from lightning_opt.tasks import Classification
from lightning_opt.testing.ranks import on_ranks

STEPS, ACCUMULATED, BATCH, SAMPLES = 50, 2, 16, 128
VOCAB, LENGTH, CLASSES = 64, 12, 4
CLIP = 0.5
MakeCallbacks = Callable[[], list[pl.Callback]]


def module(seed: int) -> Distillation:
    """Return a student with losses on logits and on two hidden states, through trained projectors."""
    torch.manual_seed(seed)
    shape = {"num_outputs": CLASSES, "vocab_size": VOCAB, "max_length": LENGTH, "heads": 4, "mlp_ratio": 2.0}
    student = TextEncoder(dim=32, depth=4, dropout=0.0, **shape)
    teacher = TextEncoder(dim=48, depth=6, dropout=0.0, **shape)
    return Distillation(
        student,
        teacher,
        task=Classification(num_outputs=CLASSES),
        losses=[
            Term(HiddenStates({"blocks.0": "blocks.1", "blocks.3": "blocks.5"})),
            Term(KD(temperature=2.0), weight=0.5),
        ],
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
    )


class Data(pl.LightningDataModule):
    """The same samples in batch k for any number of processes that see different ones."""

    def __init__(self) -> None:
        super().__init__()
        ids = torch.randint(VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(ids, ids.sum(1) % CLASSES)

    def train_dataloader(self) -> Any:
        replicas = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        return train_loader(self.data, batch_size=BATCH // replicas, seed=5, trainer=self.trainer)


class Notes(pl.Callback):
    """Keep the loss that is logged at each batch, and at the end the masks and the quantizers of this process."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.masks: dict[str, Any] = {}
        self.quantizers: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Prune):
                saved = callback.state_dict()["masks"]["masks"]
                self.masks = {name: mask["bits"] for name, mask in saved.items() if mask["bits"] is not None}
        for name, quantizer in quantizers(pl_module.model).items():
            for key, value in quantizer.state_dict().items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                self.quantizers[f"{name}.{key}"] = whole.detach().clone()


def train(
    make: Callable[[], Any], *, ranks: int, callbacks: MakeCallbacks | None = None, seed: int = 1
) -> list[dict[str, Any]]:
    """Train under a strategy and return what each process saw, or why it was refused.

    Args:
        make: Makes the strategy, in the process.
        ranks: How many processes.
        callbacks: Makes what prunes or quantizes.
        seed: Of the weights.
    """

    def job() -> dict[str, Any]:
        warnings.simplefilter("ignore")
        try:
            return _fit(make(), ranks, callbacks() if callbacks else [], seed)
        except ConfigError as error:
            return {"refused": str(error)}

    return on_ranks(job, ranks=ranks, timeout_s=280.0)


def _fit(strategy: Any, ranks: int, callbacks: Sequence[pl.Callback], seed: int) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    notes = Notes()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=-1,
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=CLIP,
        log_every_n_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[*callbacks, notes],
    )
    trainer.fit(module(seed), datamodule=Data())
    return {"losses": notes.losses, "masks": notes.masks, "quantizers": notes.quantizers}


def prunings() -> dict[str, MakeCallbacks]:
    """Return what prunes, by name: global and per-layer thresholds, and a fixed pattern."""
    from lightning_opt.pruning.allocation import ERK, GlobalAllocation
    from lightning_opt.pruning.patterns import NM

    moments = {"start": "5 steps", "end": "40 steps", "every": "5 steps", "include": ["blocks"]}
    return {
        "global threshold": lambda: [Prune(allocation=GlobalAllocation(), sparsity=0.8, **moments)],
        "ERK": lambda: [Prune(allocation=ERK(), sparsity=0.8, **moments)],
        "2:4": lambda: [Prune(NM(2, 4), **moments)],
    }


def quantizings() -> dict[str, MakeCallbacks]:
    """Return what quantizes, by name."""
    from lightning_opt.quantization.observers import MinMax
    from lightning_opt.quantization.scheme import Scheme

    moments: dict[str, Any] = {"start": "10 steps", "freeze_observers": "30 steps", "freeze_batch_norm": None}
    extremes = Scheme(activation_observer=MinMax())
    return {
        "w8a8, extremes": lambda: [Quantize(extremes, **moments)],
        "w4a8_lsq": lambda: [Quantize("w4a8_lsq", **moments)],
    }
