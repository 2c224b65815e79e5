"""FSDP2 for any LightningModule: losses, weights, metrics and refusals against one process."""

import functools

import pytest
import torch
from parallel_job import STEPS, Data, Stranger, distillation, encoder, fit
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_opt.errors import ConfigError
from lightning_opt.modules import Supervised
from lightning_opt.strategies.sharded_presets import fsdp2, fsdp2_tp
from lightning_opt.strategies.wrapping import Wrapping, repeated_blocks
from lightning_opt.tasks import Classification
from lightning_opt.testing.ranks import on_ranks

CLIPPED = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}


class Normed(Stranger):
    """A stranger's module with batch norm."""

    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(16))


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def supervised():
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
    return Supervised(encoder(1), task=Classification(num_outputs=3), optimizer=optimizer)


def fit_all(strategy, devices):
    """Run every training of this file and return plain values."""
    said = {}
    losses, module, _ = fit(distillation, strategy=strategy(), devices=devices, **CLIPPED)
    said["distillation"] = losses, weights(module)
    losses, module, _ = fit(
        Stranger, strategy=strategy(), devices=devices, gradient_clip_val=0.02, gradient_clip_algorithm="value"
    )
    said["stranger"] = losses, weights(module)
    losses, module, _ = fit(distillation, strategy=strategy(), devices=devices, precision="bf16-mixed", steps=6)
    said["bf16-mixed"] = losses, weights(module)
    losses, module, trainer = fit(supervised, strategy=strategy(), devices=devices, steps=4, limit_val_batches=1.0)
    metrics = trainer.validate(module, Data(), verbose=False)[0]
    said["supervised"] = losses, weights(module), {name: float(value) for name, value in metrics.items()}
    said["right"] = trainer.validate(Stranger(), Data(), verbose=False)[0]["val/right"]
    return said


def mean_of(ranks, name, *, copies=1):
    """Return the loss of the whole batch from those of the ranks that see different samples."""
    return torch.stack([one[name][0] for one in ranks[::copies]]).mean(0)


@pytest.fixture(scope="module")
def single():
    return fit_all(lambda: "auto", 1)


@pytest.fixture(scope="module")
def sharded():
    return on_ranks(lambda: fit_all(fsdp2, 2), timeout_s=180)


@pytest.mark.support(method=["distil_logit", "distil_feature"], strategy="fsdp2", feature="loss")
@pytest.mark.parametrize(("name", "tolerance"), [("distillation", 1e-5), ("stranger", 1e-5), ("bf16-mixed", 2e-2)])
def test_losses_and_weights_are_those_of_one_process(single, sharded, name, tolerance):
    assert len(single[name][0]) >= 6
    assert torch.allclose(mean_of(sharded, name), single[name][0], rtol=0, atol=tolerance)
    for rank in sharded:
        assert rank[name][1].keys() == single[name][1].keys()
        assert all(torch.allclose(v, single[name][1][k], rtol=0, atol=10 * tolerance) for k, v in rank[name][1].items())


def test_the_curve_is_long_enough_and_clipping_changes_it(single):
    assert len(single["distillation"][0]) == 2 * STEPS
    unclipped, _, _ = fit(distillation, accumulate_grad_batches=2)
    assert (unclipped - single["distillation"][0]).abs().max() > 1e-3


@pytest.mark.support(method="supervised", strategy="fsdp2", feature="trains")
def test_metrics_are_of_all_samples(single, sharded):
    for rank in sharded:
        assert rank["supervised"][2] == pytest.approx(single["supervised"][2], abs=1e-5)
        assert rank["right"] == single["right"]


def job_layout():
    """Return what each process holds while it trains, and that it has everything afterwards."""
    seen = {}

    class Look(Stranger):
        def on_train_batch_start(self, batch, batch_idx):
            held = dict(self.named_parameters())
            seen["kinds"] = all(isinstance(one, DTensor) for one in held.values())
            seen["share"] = sum(one.to_local().numel() for one in held.values())
            seen["all"] = sum(one.numel() for one in held.values())

    fit(Look, strategy=fsdp2(), devices=2, steps=2)
    seen["offload"] = fit(Look, strategy=fsdp2(cpu_offload=True, reshard_after_forward=False), devices=2, steps=4)[0]
    _, kept, _ = fit(Stranger, strategy=fsdp2(keep_sharded=True), devices=2, steps=1)
    seen["kept"] = all(isinstance(one, DTensor) for one in kept.parameters())
    _, normed, trainer = fit(Normed, strategy=fsdp2(), devices=2, steps=4, limit_val_batches=1.0)
    trainer.validate(normed, Data(), verbose=False)
    seen["statistics"] = normed.body[-1].running_mean.clone()
    seen["alone"] = fit(Sharding, strategy=fsdp2(), devices=2, steps=6, gradient_clip_val=0.05)[0]
    return seen


class Sharding(Stranger):
    """A stranger who shards by himself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"] if self.trainer.world_size > 1 else None
        if mesh is not None and not isinstance(self.head.weight, DTensor):
            fully_shard(self.body, mesh=mesh)
            fully_shard(self.head, mesh=mesh)
        self.scale.requires_grad_(False)


def test_each_process_holds_its_share_and_everything_afterwards():
    ranks = on_ranks(job_layout, timeout_s=120)
    assert all(rank["kinds"] and rank["kept"] for rank in ranks)
    assert sum(rank["share"] for rank in ranks) <= ranks[0]["all"] + 1  # the single number is on both
    assert max(rank["share"] for rank in ranks) < 0.6 * ranks[0]["all"]
    one = fit(Stranger, steps=4)[0]
    assert torch.allclose(torch.stack([rank["offload"] for rank in ranks]).mean(0), one, rtol=0, atol=1e-5)
    alone = fit(Sharding, steps=6, gradient_clip_val=0.05)[0]
    assert torch.allclose(torch.stack([rank["alone"] for rank in ranks]).mean(0), alone, rtol=0, atol=1e-5)
    assert torch.equal(ranks[0]["statistics"], ranks[1]["statistics"])


@pytest.mark.parametrize(
    ("make", "processes", "words"),
    [
        (lambda: fsdp2(data_parallel_size=3), 4, "strategy.data_parallel_size=3 does not divide the 4 processes"),
        (lambda: fsdp2(data_parallel_size=2), 4, "trainer.devices=2"),
        (lambda: fsdp2_tp(tensor_parallel_size=4, data_parallel_size=2), 4, "is 8, but"),
    ],
)
def test_sizes_that_do_not_fit_the_processes_are_refused(make, processes, words):
    with pytest.raises(ConfigError, match=words):
        make().check_world(processes)


def test_what_is_wrapped():
    model = encoder(0)
    assert repeated_blocks(model) == ["blocks.0", "blocks.1"]
    assert Wrapping(patterns=["blocks.1", "blocks.*.attention"]).units(model) == [
        "blocks.0.attention",
        "blocks.1.attention",
        "blocks.1",
    ]
    with pytest.raises(ConfigError, match=r"'block\.\*' matches no module.*blocks\.0"):
        fsdp2(wrap=["block.*"]).check_model(model)
    with pytest.raises(ConfigError, match="never called"):
        fsdp2(wrap=["blocks"]).check_model(model)
    tied = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    tied[2][0].weight = tied[0][0].weight
    assert Wrapping().units(tied) == ["1"]
