"""Every file in conf/pruner says what it is, composes, and prunes a small network from end to end."""

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

from lightning_opt.callbacks import Prune
from lightning_opt.config.checks import check
from lightning_opt.models import ConvNet, ViT
from lightning_opt.pruning.structured import Structures

pytestmark = pytest.mark.filterwarnings("ignore")
CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = sorted((CONF / "pruner").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
STEPS = 40


def is_another_callback(path):
    """Files that inherit from another one name no callback."""
    first = re.search(r"^_target_: lightning_opt\.callbacks\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return first is not None and first[1] != "Prune"


OURS = [path.stem for path in FILES if not is_another_callback(path)]


def pruner_of(name, *words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"pruner={name}", *words])
    return OmegaConf.to_container(config.pruner, resolve=True)


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_the_command(name):
    first = (CONF / "pruner" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert re.search(rf"python train\.py (.* )?pruner={name}\b", first)


@pytest.mark.parametrize("name", NAMES)
def test_passes_the_checks_of_the_command_line(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"pruner={name}"])
    config.paths = {"cache_dir": "unused"}
    check(OmegaConf.to_container(config, resolve=True))


class Module(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def network(name):
    torch.manual_seed(0)
    if name == "heads":
        return ViT(image_size=8, patch_size=4, in_channels=1, dim=16, depth=1, heads=4, num_outputs=4)
    if name == "hidden":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    return ConvNet(num_outputs=4, widths=[16, 32])


@pytest.mark.parametrize("name", OURS)
def test_prunes_from_end_to_end(tmp_path, name):
    words = ["pruner.pattern.round_to=8"] if name in ("channels", "taylor_channels", "slimming") else []
    words += ["pruner.sparsity=0.2"] if name == "latency_channels" else []
    node = pruner_of(name, *words)
    prune = instantiate(node, _convert_="all")
    assert isinstance(prune, Prune)
    net = network(name)
    before = sum(p.numel() for p in net.parameters())
    data = TensorDataset(torch.randn(STEPS * 4, 1, 8, 8), torch.randint(4, (STEPS * 4,)))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[prune],
    )
    trainer.fit(Module(net), DataLoader(data, batch_size=4))
    assert prune.is_settled
    if isinstance(prune.what.pattern, Structures):
        assert sum(p.numel() for p in net.parameters()) < 0.7 * before
        return
    weights = [p for p in net.parameters() if p.dim() > 1 and p.shape[1] >= 4]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    wanted = 0.5 if name == "nm_2_4" else node["sparsity"]
    assert zeros == pytest.approx(wanted, abs=0.03)


def test_callbacks_prune_is_the_default_callbacks_and_a_pruner():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = compose("train")
        pruned = compose("train", overrides=["callbacks=prune"])
        other = compose("train", overrides=["callbacks=prune", "pruner=channels"])
    assert pruned.callbacks == plain.callbacks
    assert plain.pruner is None
    assert pruned.pruner.criterion._target_ == "lightning_opt.pruning.Magnitude"
    assert other.pruner.pattern._target_ == "lightning_opt.pruning.Structures"


def test_the_teacher_may_be_the_unpruned_self():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=["model=mlp", "pruner=magnitude", "teacher=self", "loss=kd"])
    plain = OmegaConf.to_container(config, resolve=False)
    assert plain["teacher"]["init_student"] == {"": ""}
    config.paths = {"cache_dir": "unused"}
    assert OmegaConf.to_container(config.teacher.model, resolve=True) == OmegaConf.to_container(
        config.model, resolve=True
    )
