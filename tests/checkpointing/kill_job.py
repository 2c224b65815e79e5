"""A small run with everything that makes a resume hard; as a script it is what the kill tests kill.

    python kill_job.py FOLDER [every_n_steps] [padding_megabytes]

Started again with the same folder it goes on where it stopped.
"""

import random
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_opt.checkpointing import MetricState, RngState, SaveCheckpoints, find_checkpoint, train_loader
from lightning_opt.testing.resume import Fit

SAMPLES, BATCH, EPOCHS = 40, 8, 3


class NoisyData(Dataset):
    """Augments with python's, numpy's and torch's global generators, like a stranger's data set."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = self.x[index] + 0.1 * torch.randn(6) + 0.1 * float(np.random.randn())
        return x * (1 + 0.1 * random.random()), self.y[index]


def noisy_collate(samples):
    x, y = torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])
    return x[torch.randperm(len(x))] * 0.05 * random.random() + x, y


class Net(pl.LightningModule):
    """Dropout, batch norm, noise in the forward pass, torchmetrics and epoch sums."""

    def __init__(self, scheduler="cosine", padding=0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.acc = torchmetrics.MetricCollection(
            {
                "acc": torchmetrics.classification.MulticlassAccuracy(2),
                "f1": torchmetrics.classification.MulticlassF1Score(2),
            }
        )
        self.scheduler = scheduler
        self.padding = nn.Parameter(torch.zeros(padding), requires_grad=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x + 0.01 * torch.randn_like(x))
        loss = nn.functional.cross_entropy(logits, y)
        self.acc.update(logits, y)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log_dict({f"train/{k}": v for k, v in self.acc.items()}, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_start(self):
        self.log("train/dice", random.random(), on_epoch=True)

    def on_train_batch_end(self, *_):
        self.log("train/late", torch.rand(()), on_step=False, on_epoch=True)

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val/loss", loss)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        if self.scheduler == "plateau":
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}
        if self.scheduler == "one_cycle":  # asks for the number of steps, after which no loader is given its state
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
        else:
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SAMPLES // BATCH * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(pl.LightningDataModule):
    def __init__(self, workers=0):
        super().__init__()
        self.workers = workers

    def train_dataloader(self):
        return train_loader(
            NoisyData(),
            batch_size=BATCH,
            seed=5,
            num_workers=self.workers,
            collate_fn=noisy_collate,
            trainer=self.trainer,
        )

    def val_dataloader(self):
        data = NoisyData()
        return DataLoader(TensorDataset(data.x, data.y), batch_size=16)  # draws from the global generator


def make_run(
    folder, *, workers=0, every_n_steps=1, scheduler="cosine", rng=True, metrics=True, padding=0, data=None, **trainer
):
    pl.seed_everything(3, verbose=False)
    trainer.setdefault("max_epochs", None if "max_steps" in trainer else EPOCHS)
    callbacks = [
        *(make() for make in trainer.pop("callbacks", [])),
        *([RngState()] if rng else []),
        *([MetricState()] if metrics else []),
        SaveCheckpoints(folder, monitor="val/loss", mode="min", every_n_steps=every_n_steps),
    ]
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "callbacks": callbacks,
        "default_root_dir": folder,
    }
    return Fit(pl.Trainer(**options | trainer), Net(scheduler, padding), {"datamodule": data or Data(workers)})


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    every_n_steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    padding = int(float(sys.argv[3]) * 2**18) if len(sys.argv) > 3 else 0
    run = make_run(folder, every_n_steps=every_n_steps, padding=padding)
    run.trainer.fit(run.module, ckpt_path=find_checkpoint(folder), **run.data)
    print("finished")


if __name__ == "__main__":
    main()
