"""A small distillation, and a stranger's training, whose losses are compared between one process and several."""

import functools

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_opt.checkpointing import train_loader
from lightning_opt.losses import KD, HiddenStates, Term
from lightning_opt.models import TextEncoder
from lightning_opt.modules import Distillation
from lightning_opt.tasks import Classification

SAMPLES, BATCH, STEPS, VOCAB, LENGTH = 64, 8, 10, 40, 10


def encoder(seed, *, dim=16, depth=2, **options):
    torch.manual_seed(seed)
    return TextEncoder(
        num_outputs=3, vocab_size=VOCAB, max_length=LENGTH, dim=dim, depth=depth, heads=4, mlp_ratio=2.0, **options
    )


def distillation(**options):
    """A student with a hidden-state loss, for which it has a projector, and a logit loss."""
    student, teacher = encoder(1, **options), encoder(2, dim=24, depth=3)
    return Distillation(
        student,
        teacher,
        task=Classification(num_outputs=3),
        losses=[Term(HiddenStates({"blocks.1": "blocks.2"})), Term(KD(temperature=2.0), weight=0.5)],
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.05),
    )


class Stranger(pl.LightningModule):
    """Somebody's module: two networks and a number of its own, no `configure_model`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Sequential(nn.Embedding(VOCAB, 12), nn.Flatten(), nn.Linear(12 * LENGTH, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.scale * self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log(
            "val/right",
            (self.head(self.body(batch[0])).argmax(-1) == batch[1]).sum().float(),
            reduce_fx="sum",
            sync_dist=True,
        )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size=BATCH, samples=SAMPLES):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, VOCAB, (samples, LENGTH), generator=generator)
        self.data = TensorDataset(ids, ids.sum(1) % 3)
        self.batch_size = batch_size

    def train_dataloader(self):
        replicas = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        return train_loader(self.data, batch_size=self.batch_size // replicas, seed=5, trainer=self.trainer)

    def val_dataloader(self):
        from lightning_opt.checkpointing.loader import eval_loader

        return eval_loader(self.data, batch_size=4, trainer=self.trainer)


class Losses(pl.Callback):
    """Keeps the loss of every batch and, where clipping is on, what the norm was before."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].detach().float())


def fit(make, *, strategy="auto", devices=1, steps=STEPS, data=None, callbacks=(), **trainer):
    """Train and return the losses, the module's weights afterwards and the trainer."""
    pl.seed_everything(3, verbose=False)
    losses = Losses()
    options = {
        "accelerator": "cpu",
        "logger": False,
        "max_epochs": -1,
        "max_steps": steps,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
    }
    trainer = pl.Trainer(**options | trainer, strategy=strategy, devices=devices, callbacks=[losses, *callbacks])
    module = make()
    trainer.fit(module, datamodule=data or Data())
    return torch.stack(losses.seen), module, trainer
