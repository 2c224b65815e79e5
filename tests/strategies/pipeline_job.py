"""A small distillation that runs the same in one process and in a pipeline."""

import logging
import warnings

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_opt.losses import KD, HiddenStates, Term
from lightning_opt.models.gpt import GPT
from lightning_opt.models.text import TextEncoder
from lightning_opt.modules import Distillation, Supervised
from lightning_opt.tasks import Classification, LanguageModeling

VOCABULARY, LENGTH = 50, 8


class Texts(pl.LightningDataModule):
    """Random texts of different lengths; `samples` need not be a multiple of `batch_size`."""

    def __init__(self, samples=48, batch_size=8, language_model=False, only_ids=False):
        super().__init__()
        self.samples, self.batch_size, self.language_model = samples, batch_size, language_model
        self.only_ids = only_ids
        g = torch.Generator().manual_seed(3)
        lengths = torch.randint(3, LENGTH + 1, (samples,), generator=g)
        self.mask = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
        self.ids = torch.randint(1, VOCABULARY, (samples, LENGTH), generator=g) * self.mask
        self.classes = torch.randint(3, (samples,), generator=g)
        following = torch.cat([self.ids[:, 1:], torch.zeros(samples, 1, dtype=torch.long)], dim=1)
        self.following = torch.where(following == 0, -100, following)

    def _rows(self):
        texts = self

        class Rows(Dataset):
            def __len__(self):
                return texts.samples

            def __getitem__(self, row):
                labels = texts.following[row] if texts.language_model else texts.classes[row]
                masks = {} if texts.only_ids else {"attention_mask": texts.mask[row]}
                return {"input_ids": texts.ids[row], **masks, "labels": labels}

        return Rows()

    def train_dataloader(self):
        return DataLoader(self._rows(), self.batch_size)

    def val_dataloader(self):
        return DataLoader(Subset(self._rows(), range(20)), 7)

    def example_inputs(self, count):
        masks = {} if self.only_ids else {"attention_mask": self.mask[:count]}
        return {"input_ids": self.ids[:count], **masks}


def encoder(dim=16, depth=4):
    return TextEncoder(num_outputs=3, vocab_size=VOCABULARY, dim=dim, depth=depth, heads=2, max_length=LENGTH)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


def distillation(optimizer=adamw):
    """Losses on the logits, on a layer in the middle, and on two layers of which one is early; a wider teacher."""
    torch.manual_seed(0)
    losses = [
        Term(KD(temperature=2.0), weight=0.5),
        Term(HiddenStates({"blocks.1": "blocks.1"}), weight=0.3, name="early"),
        Term(HiddenStates({"blocks.0": "blocks.0", "blocks.3": "blocks.3"}), name="both"),
    ]
    return Distillation(encoder(), encoder(24), task=Classification(num_outputs=3), losses=losses, optimizer=optimizer)


def language_model(tied=True):
    torch.manual_seed(0)
    model = GPT(vocab_size=VOCABULARY, dim=16, depth=3, heads=2, context_length=LENGTH, tied_embeddings=tied)
    return Supervised(model, task=LanguageModeling(num_outputs=VOCABULARY), optimizer=adamw)


class Losses(pl.Callback):
    """Keeps what is logged in each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        values = trainer.callback_metrics
        self.steps.append([float(values[name]) for name in sorted(values) if name.startswith("train/")])


def fit(strategy="auto", devices=1, *, make=distillation, data=None, epochs=2, callbacks=(), ckpt_path=None, **options):
    """Train and return the logged losses of all steps, the last metrics, and the whole state."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, losses = make(), Losses()
    settings = {
        "gradient_clip_val": 0.5,
        "accumulate_grad_batches": 2,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "max_epochs": epochs,
        **options,
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        callbacks=[losses, *callbacks],
        **settings,
    )
    trainer.fit(module, datamodule=data or Texts(), ckpt_path=ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return losses.steps, metrics, {name: value.clone() for name, value in module.state_dict().items()}


def distance(one, other):
    """Return how far two fits are apart: in the losses of any step, in the metrics, and in the weights."""
    assert len(one[0]) == len(other[0])
    assert one[1].keys() == other[1].keys()
    assert one[2].keys() == other[2].keys()
    steps = max(abs(a - b) for x, y in zip(one[0], other[0], strict=True) for a, b in zip(x, y, strict=True))
    metrics = max(abs(one[1][name] - other[1][name]) for name in one[1])
    weights = max(float((one[2][name].double() - other[2][name].double()).abs().max()) for name in one[2])
    return steps, metrics, weights
