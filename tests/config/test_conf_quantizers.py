"""Every file in conf/quantizer says what it is, composes, and quantizes a small network from end to end."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.callbacks import Quantize
from lightning_opt.checkpointing import SaveCheckpoints
from lightning_opt.config.checks import check
from lightning_opt.models import ConvNet
from lightning_opt.quantization.state import quantizers, weight_quantizers

pytestmark = pytest.mark.filterwarnings("ignore")
CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "quantizer").glob("*.yaml"))
STEPS = 16
BITS = {
    "adaround": (4, 8),
    "dynamic": (8, 8),
    "equalize": (8, 8),
    "fp8": (8, 8),
    "gptq": (4, None),
    "lsq": (4, 4),
    "mixed": (8, 8),
    "pact": (4, 4),
    "qat": (8, 8),
    "qat_w2a8": (2, 8),
    "qat_w4a8": (4, 8),
    "smooth": (8, 8),
    "static": (8, 8),
    "weight_only": (8, None),
    "weight_only_int4": (4, None),
}


def compose_with(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(words))


def quantizer_of(name, *words):
    node = OmegaConf.to_container(compose_with(f"quantizer={name}", *words).quantizer, resolve=True)
    return instantiate(node, _convert_="all")


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_the_command(name):
    first = (CONF / "quantizer" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert re.search(rf"python train\.py (.* )?quantizer={name}\b", first)


@pytest.mark.parametrize("name", NAMES)
def test_passes_the_checks_of_the_command_line(name):
    config = compose_with(f"quantizer={name}")
    config.paths = {"cache_dir": "unused"}
    check(OmegaConf.to_container(config, resolve=True))


class Module(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def network(name):
    torch.manual_seed(0)
    if name == "smooth":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
        )
    return ConvNet(num_outputs=4, widths=[8, 16])


@pytest.mark.parametrize("name", NAMES)
def test_quantizes_from_end_to_end(tmp_path, name):
    words = ["quantizer.calibration_samples=16"] if "qat" not in name and name not in ("lsq", "pact") else []
    quantize = quantizer_of(name, *words)
    assert isinstance(quantize, Quantize)
    net = network(name)
    data = TensorDataset(torch.randn(STEPS * 4, 1, 8, 8), torch.randint(4, (STEPS * 4,)))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[quantize, SaveCheckpoints(tmp_path, monitor="val/acc")],
    )
    trainer.fit(Module(net), DataLoader(data, batch_size=4), DataLoader(data, batch_size=16))
    assert quantize.is_settled
    weight, activation = BITS[name]
    assert {q.grid.bits for _, q in weight_quantizers(net)} == {weight}
    others = {n: q for n, q in quantizers(net).items() if not n.endswith("weight_quantizer")}
    assert {q.grid.bits for q in others.values()} == (set() if activation is None else {activation})
    assert all(q.enabled and q.is_fitted for q in quantizers(net).values())
    assert [stage["method"] for stage in quantize.stages()] == ["quantize"]


def test_callbacks_quantize_is_the_default_callbacks_and_a_quantizer():
    plain, quantized = compose_with(), compose_with("callbacks=quantize")
    other = compose_with("callbacks=quantize", "quantizer=static")
    assert quantized.callbacks == plain.callbacks
    assert plain.quantizer is None
    assert quantized.quantizer.method == "qat"
    assert other.quantizer.method == "post_training"
