"""A small training for the tests of pruning: a stranger's LightningModule and data that can be stopped anywhere."""

import functools

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_opt.checkpointing import MetricState, RngState, SaveCheckpoints, train_loader
from lightning_opt.testing.resume import Fit

SAMPLES, BATCH, EPOCHS = 48, 8, 3
STEPS = SAMPLES // BATCH * EPOCHS


class Mlp(nn.Sequential):
    """Three layers and dropout."""

    def __init__(self, width=16):
        super().__init__(
            nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )


class Conv(nn.Module):
    """Convolutions with batch norm and a skip connection over `(B, 1, 4, 4)`."""

    def __init__(self, width=8, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), norm(2 * width), nn.ReLU())
        self.two = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x.reshape(-1, 1, 4, 4))
        return self.head((x + self.two(self.one(x))).mean((2, 3)))


class Stranger(pl.LightningModule):
    """Somebody's module: it has a `net` and a loss, and knows nothing of pruning."""

    def __init__(self, net=None, *, make=None, lr=0.02):
        super().__init__()
        self.net = Mlp() if net is None else net
        self.make = make or functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.seen.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def dataset(features=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, features, generator=generator)
    return TensorDataset(x, (x[:, :4] + 0.1 * torch.randn(SAMPLES, 4, generator=generator)).argmax(1))


class Data(pl.LightningDataModule):
    def __init__(self, features=8):
        super().__init__()
        self.data = dataset(features)

    def train_dataloader(self):
        return train_loader(self.data, batch_size=BATCH // self.trainer.world_size, seed=5, trainer=self.trainer)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.data, batch_size=24)


def make_run(folder, *callbacks, module=None, features=8, every_n_steps=1, save=True, **trainer):
    """Make a run; `callbacks` are functions that make callbacks, since each run needs fresh ones."""
    pl.seed_everything(3, verbose=False)
    made = [make() for make in callbacks]
    if save:
        made += [RngState(), MetricState(), SaveCheckpoints(folder, every_n_steps=every_n_steps)]
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": EPOCHS,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": save,
        "use_distributed_sampler": False,
        "callbacks": made,
        "default_root_dir": folder,
    }
    return Fit(pl.Trainer(**options | trainer), module() if module else Stranger(), {"datamodule": Data(features)})


def fit(run, resume=None):
    """Fit, and return the run."""
    run.trainer.fit(run.module, ckpt_path=resume, **run.data)
    return run
