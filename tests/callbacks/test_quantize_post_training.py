"""Post-training quantization in `on_fit_end`: of the best weights, on known samples, within a limit, and repeatable."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from prune_job import SAMPLES, Stranger, dataset, fit
from quantize_job import FEATURES, Residual, answers, of, run_of, train
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_opt.callbacks import Prune, Quantize
from lightning_opt.callbacks.quantize_samples import calibration_inputs
from lightning_opt.checkpointing import SaveCheckpoints
from lightning_opt.errors import ConfigError
from lightning_opt.quantization.bias_correction import BiasCorrection
from lightning_opt.quantization.calibration import CalibrationError
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import quantizers, weight_quantizers
from lightning_opt.testing.resume import compare_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
AFTER = partial(Quantize, method="post_training", calibration_samples=24)


def best_run(folder, *callbacks, **options):
    """A run with a best checkpoint."""
    best = partial(SaveCheckpoints, folder, monitor="val/loss", mode="min")
    return run_of(folder, *callbacks, best, **{"save": False, "enable_checkpointing": True, **options})


class Early(Stranger):
    """Is best after its first epoch."""

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        self.log("val/loss", torch.tensor(float(self.trainer.global_step)))


def early():
    return Early(Residual())


@pytest.mark.support(method="ptq", strategy="one", feature="trains")
def test_the_best_weights_are_quantized_on_the_first_samples(tmp_path):
    """The outside reference: the checkpoint's weights, quantized by hand on the data set's first samples."""
    run = fit(best_run(tmp_path, AFTER, module=early))
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["global_step"] == SAMPLES // 8
    net = Residual()
    net.load_state_dict({name.removeprefix("net."): value for name, value in saved["state_dict"].items()})
    samples = dataset(FEATURES).tensors[0][:24]
    expected = quantize(net, samples[:2], "w8a8", calibration=samples.split(8), convert=False)
    assert torch.equal(answers(run.module.net), answers(expected))
    assert not torch.equal(answers(expected), answers(net))


def test_its_checkpoint_gives_a_fresh_module_the_same_answers(tmp_path):
    run = fit(best_run(tmp_path, AFTER))
    callback = of(run)
    assert callback.checkpoint_path == str(tmp_path / "quantized.ckpt")
    fresh = run_of(tmp_path, AFTER, save=False)
    fresh.trainer.validate(fresh.module, **fresh.data, ckpt_path=callback.checkpoint_path, verbose=False)
    assert torch.equal(answers(fresh.module.net), answers(run.module.net))
    (stage,) = callback.stages()
    assert stage["what"] == "w8a8: post-training quantization, ranges from 24 samples"
    assert stage["from_step"] == stage["to_step"] == 18


@pytest.mark.support(method="ptq", strategy="one", feature="resume")
def test_a_run_that_was_killed_at_its_end_does_it_again(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(best_run(whole, AFTER))
    fit(best_run(cut))
    again = fit(best_run(cut, AFTER), resume=cut / "last.ckpt")
    assert again.trainer.global_step == 18
    ignore = ["callbacks.SaveCheckpoints", "callbacks.Quantize", "loops", "lightning_opt"]
    assert compare_checkpoints(whole / "quantized.ckpt", cut / "quantized.ckpt", ignore=ignore) == []


def test_lightnings_checkpoints_are_known_too(tmp_path):
    best = partial(ModelCheckpoint, tmp_path, monitor="val/loss", mode="min", filename="best")
    run = train(tmp_path, AFTER, best, module=early, enable_checkpointing=True)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(run.module.net.head.weight, saved["net.head.weight"])
    assert of(run).checkpoint_path == str(tmp_path / "quantized.ckpt")


def test_without_checkpoints_the_last_weights_are_quantized(tmp_path):
    plain, run = train(tmp_path), train(tmp_path, AFTER, default_root_dir=tmp_path)
    assert torch.equal(plain.module.net.head.weight, run.module.net.head.weight)
    assert (tmp_path / "checkpoints" / "quantized.ckpt").is_file()


def test_training_is_the_one_without_it(tmp_path):
    plain, run = train(tmp_path), train(tmp_path, AFTER)
    assert torch.equal(torch.stack(plain.module.seen), torch.stack(run.module.seen))


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8", "w4g32"])
def test_schemes_without_ranges_of_activations_need_no_samples(tmp_path, scheme):
    net = partial(nn.Sequential, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    quantizer = partial(Quantize, scheme, method="post_training", calibration_samples=10_000)
    run = train(tmp_path, quantizer, module=lambda: Stranger(net()))
    assert all(q.enabled for q in quantizers(run.module.net).values())
    assert of(run).stages()[0]["what"] == f"{scheme}: post-training quantization"


def test_averaged_and_pruned_weights_are_the_ones_that_are_quantized(tmp_path):
    masks = partial(Prune, start="1 steps", end="10 steps", every="1 steps", sparsity=0.75)
    run = fit(best_run(tmp_path, partial(EMAWeightAveraging, decay=0.5), masks, AFTER))
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(run.module.net.head.weight, saved["net.head.weight"])
    assert (
        sum(int((layer.weight == 0).sum()) for layer, _ in weight_quantizers(run.module.net))
        / sum(layer.weight.numel() for layer, _ in weight_quantizers(run.module.net))
        > 0.7
    )


def test_improvements_are_made(tmp_path):
    plain = train(tmp_path, partial(AFTER, "w4a8"))
    better = train(tmp_path, partial(AFTER, "w4a8", improve=[BiasCorrection()]))
    assert not torch.equal(plain.module.net.head.bias, better.module.net.head.bias)
    assert of(better).stages()[0]["what"].startswith("w4a8, BiasCorrection: post-training")


class Scored(Stranger):
    """Logs how far its answers are from what they were in float: what mixed precision has to keep small."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("max_drop", [1e-7, 10.0])
def test_a_limit_is_kept_on_validation_data(tmp_path, max_drop):
    """Next to nothing allowed: all is float, or in more bits; much allowed: all is in two bits."""
    quantizer = partial(AFTER, "w2a8", max_drop=max_drop)
    run = fit(best_run(tmp_path, quantizer, module=lambda: Scored(Residual())))
    bits = {layer_q[1].grid.bits for layer_q in weight_quantizers(run.module.net)}
    rows = of(run).stages()[0]["layers"]
    assert [row["name"] for row in sorted(rows, key=lambda row: -row["sensitivity"])] == [row["name"] for row in rows]
    assert len(rows) == 4
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    before = Residual()
    before.load_state_dict({name.removeprefix("net."): value for name, value in saved.items()})
    x, y = dataset(FEATURES).tensors
    drop = loss_of(run.module.net, x, y) - loss_of(before, x, y)
    assert drop <= max_drop + 1e-6
    assert (bits == {2}) == (max_drop > 1)
    assert of(run).is_settled


def loss_of(net, x, y):
    """Return the mean over two batches of one size, as validation does."""
    with torch.no_grad():
        pairs = zip(x.split(24), y.split(24), strict=True)
        return float(torch.stack([nn.functional.cross_entropy(net.eval()(a), b) for a, b in pairs]).mean())


def test_callbacks_and_loggers_see_nothing_of_the_search(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.global_step)

    fit(best_run(tmp_path, Look, partial(AFTER, "w2a8", max_drop=0.1)))
    assert seen == [0, 6, 12, 18]


def test_too_many_samples_are_refused_before_training(tmp_path):
    run = run_of(tmp_path, partial(AFTER, calibration_samples=SAMPLES + 1), save=False)
    with pytest.raises(ConfigError, match=f"calibration_samples={SAMPLES + 1}: there are {SAMPLES} training samples"):
        fit(run)
    assert run.module.seen == []


def test_a_limit_without_a_metric_or_a_network_of_its_own_is_refused_before_training(tmp_path):
    run = run_of(tmp_path, partial(AFTER, max_drop=0.1), save=False)
    with pytest.raises(ConfigError, match="max_drop needs to know which validation metric"):
        fit(run)
    alone = best_run(tmp_path, partial(AFTER, max_drop=0.1), module=Whole)
    with pytest.raises(ConfigError, match="the LightningModule itself is the network"):
        fit(alone)
    silent = best_run(tmp_path, partial(AFTER, max_drop=0.1), limit_val_batches=0)
    with pytest.raises(ConfigError, match="there is no validation data"):
        fit(silent)
    assert run.module.seen == alone.module.seen == silent.module.seen == []


class Whole(pl.LightningModule):
    """A module that is its own network."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 8), nn.Linear(8, 4)
        self.seen = []

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.seen.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("quantizer", [AFTER, partial(Quantize, start="4 steps")])
def test_a_module_that_is_its_own_network_is_quantized(tmp_path, quantizer):
    run = fit(run_of(tmp_path, quantizer, module=Whole))
    assert {name.partition(".")[0] for name in quantizers(run.module)} >= {"one", "two"}
    assert all(q.enabled and q.is_fitted for q in quantizers(run.module).values())


def test_values_that_are_not_finite_are_refused_and_the_checkpoint_stays(tmp_path):
    run = best_run(tmp_path, AFTER)
    original = run.data["datamodule"].data.tensors[0]
    poisoned = partial(poison, run)
    run.trainer.callbacks.insert(0, AtEnd(poisoned))
    with pytest.raises(CalibrationError, match="NaN"):
        fit(run)
    assert (tmp_path / "last.ckpt").is_file()
    assert not (tmp_path / "quantized.ckpt").exists()
    assert original is not None


class AtEnd(pl.Callback):
    def __init__(self, act):
        self.act = act

    def on_train_end(self, trainer, pl_module):
        self.act()


def poison(run):
    run.data["datamodule"].data.tensors[0][3] = float("nan")


class Endless(IterableDataset):
    def __iter__(self):
        x, y = dataset(FEATURES).tensors
        yield from zip(x, y, strict=True)


def test_samples_come_in_the_order_of_the_data_set(tmp_path):
    x = dataset(FEATURES).tensors[0]
    plain = DataLoader(dataset(FEATURES), batch_size=7, shuffle=True)
    endless = DataLoader(Endless(), batch_size=5)
    for loader in (plain, endless):
        run = run_of(tmp_path, save=False)
        run.trainer.fit(run.module, train_dataloaders=loader)
        found = torch.cat(calibration_inputs(run.trainer, run.module, 20))
        assert torch.equal(found, x[:20])


def test_a_scheme_of_ones_own_keeps_its_observer(tmp_path):
    scheme = Scheme(rules={"head": None})
    run = train(tmp_path, partial(Quantize, scheme, method="post_training", calibration_samples=24))
    assert not any(name.startswith("head") for name, _ in quantizers(run.module.net).items() if "weight" in name)
    assert copy.deepcopy(run.module.net) is not None
