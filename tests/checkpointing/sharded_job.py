"""A small training that is stopped under one strategy and goes on under another."""

import functools
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset

from lightning_opt.checkpointing import MetricState, RngState, SaveCheckpoints, train_loader
from lightning_opt.models import TextEncoder
from lightning_opt.modules import Supervised
from lightning_opt.strategies import ddp
from lightning_opt.strategies.pipeline import pipeline
from lightning_opt.strategies.sharded_presets import fsdp2, fsdp2_tp, tensor_parallel
from lightning_opt.tasks import Classification

SAMPLES, BATCH, VOCABULARY, LENGTH = 32, 8, 30, 6
HALF, STEPS = 5, 10  # an epoch has 4 steps: the stop is inside one

STRATEGIES = {
    "one": (1, lambda: "auto"),
    "ddp": (2, ddp),
    "fsdp2": (2, fsdp2),
    "fsdp2 on 4": (4, fsdp2),
    "tensor": (2, tensor_parallel),
    "both": (4, lambda: fsdp2_tp(tensor_parallel_size=2)),
    "pipeline": (2, lambda: pipeline(micro_batches=2, costs="parameters")),
    "pipeline of 4": (4, lambda: pipeline(micro_batches=2, costs="parameters")),
}


class Texts(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index].sum() % 3}


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        replicas = (self.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        return train_loader(Texts(), batch_size=BATCH // replicas, seed=5, trainer=self.trainer)

    def example_inputs(self, batch_size=1):
        return {"input_ids": Texts().ids[:batch_size]}


def network(dropout=0.0):
    torch.manual_seed(1)
    return TextEncoder(
        num_outputs=3,
        vocab_size=VOCABULARY,
        max_length=LENGTH,
        dim=16,
        depth=4,
        heads=4,
        mlp_ratio=2.0,
        dropout=dropout,
    )


def groups(parameters):
    """Two groups: a checkpoint has to find each parameter's state and group again."""
    matrices, others = [], []
    for one in parameters:
        (matrices if one.ndim > 1 else others).append(one)
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 2e-3}], lr=1e-3)


def make_trainer(folder, strategy, devices, steps, *, callbacks=(), **options):
    return pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[*callbacks, RngState(), MetricState(), SaveCheckpoints(folder, every_n_steps=2)],
        **options,
    )


def train(folder: Path, name, steps, *, resume=None, model=None, callbacks=()):
    """Train under a named strategy; return the whole weights afterwards and the state of the generator."""
    devices, make = STRATEGIES[name]
    pl.seed_everything(3, verbose=False)
    trainer = make_trainer(folder, make(), devices, steps, callbacks=callbacks)
    optimizer = functools.partial(groups)
    module = Supervised(model or network(), task=Classification(num_outputs=3), optimizer=optimizer)
    trainer.fit(module, datamodule=Data(), ckpt_path=resume)
    weights = {key: value.detach().clone() for key, value in module.model.state_dict().items()}
    return {"weights": weights, "random": torch.get_rng_state(), "step": trainer.global_step}
