"""What cannot work is refused before training, with a sentence that names the argument, the value and what to do."""

from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from prune_job import Stranger, fit
from quantize_job import QAT, Residual, run_of, train
from torch import nn

from lightning_opt.callbacks import Quantize
from lightning_opt.callbacks.moments import Length
from lightning_opt.callbacks.quantize_ranks import refuse_strategy
from lightning_opt.errors import ConfigError
from lightning_opt.quantization.smooth import SmoothQuant

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w9a8"}, "scheme='w9a8'.*known are w8a8"),
        ({"scheme": 8}, "scheme=8: give a Scheme"),
        ({"method": "ptq"}, "method='ptq': give 'qat' or 'post_training'"),
        ({"start": "soon"}, "start='soon'"),
        ({"start": 0.9}, r"freeze_observers=0\.8 comes before start=0\.9"),
        ({"calibration_samples": 0}, "calibration_samples=0"),
        ({"calibration_samples": True}, "calibration_samples=True"),
        ({"exclude": "head"}, "exclude='head': give a list"),
        ({"improve": [SmoothQuant()]}, "improve=.* goes with method='post_training' only"),
        ({"improve": ["smooth"], "method": "post_training"}, "improve=.*SmoothQuant"),
        ({"max_drop": 0.1}, r"max_drop=0\.1 goes with method='post_training' only"),
        ({"max_drop": -0.1, "method": "post_training"}, r"max_drop=-0\.1"),
        ({"max_drop": float("nan"), "method": "post_training"}, "max_drop=nan"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


class Silent(nn.Module):
    """Has nothing that could be rounded."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x[:, :4] * self.scale


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (Residual, {"exclude": ["haed"]}, "exclude='haed' matches no module"),
        (Residual, {"module": "nett"}, "module='nett' is no part of Stranger; near names: net"),
        (
            Residual,
            {"start": "19 steps", "freeze_observers": 1.0},
            "start='19 steps' is step 19, and training ends at step 18",
        ),
        (Residual, {"start": 1.0, "freeze_observers": 1.0, "freeze_batch_norm": None}, r"start=1\.0 is step 18"),
        (Residual, {"freeze_observers": "4 epochs"}, "freeze_observers='4 epochs' is step 24"),
        (Residual, {"freeze_observers": "2 steps"}, r"freeze_observers='2 steps' \(step 2\) comes before start"),
        (Silent, {}, "no layer of Silent can be quantized"),
    ],
)
def test_before_the_first_step(tmp_path, net, options, message):
    run = run_of(tmp_path, partial(Quantize, **options), module=lambda: Stranger(net()), save=False)
    with pytest.raises(ConfigError, match=message):
        fit(run)
    assert run.module.seen == []


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_are_not_known_are_refused_by_name(kind):
    trainer = SimpleNamespace(strategy=kind.__new__(kind))
    with pytest.raises(ConfigError, match=f"strategy={kind.__name__}.*FSDP2"):
        refuse_strategy(trainer, method="qat")


def test_what_sharded_models_cannot_do_is_refused_by_name():
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = SimpleNamespace(strategy=strategy, world_size=2)
    refuse_strategy(trainer, method="qat")
    with pytest.raises(ConfigError, match="strategy=ModelParallelStrategy: method='post_training' needs whole weights"):
        refuse_strategy(trainer, method="post_training")
    trainer.strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="tensor_parallel_size=2"):
        refuse_strategy(trainer, method="qat")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strategy": "ddp_fork"}, "strategy=ddp_fork"), ({"strategy": "ddp", "sync_batchnorm": True}, "sync_batchnorm")],
)
def test_processes_that_are_forked_and_norms_that_are_replaced_are_refused(tmp_path, options, message):
    run = run_of(tmp_path, QAT, devices=2, save=False, **options)
    with pytest.raises(ConfigError, match=message):
        run.trainer.callbacks[0].setup(run.trainer, run.module, "fit")


def test_two_of_them_on_one_network_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two Quantize callbacks work on the same network"):
        train(tmp_path, partial(QAT, module="net"), partial(QAT))


class Two(pl.LightningModule):
    """Holds two networks."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Residual(), Residual()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.one(batch[0]) + self.two(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_two_networks_of_one_module_have_one_each(tmp_path):
    run = train(tmp_path, partial(QAT, module="one"), partial(QAT, "w4a8", module="two"), module=Two)
    assert run.module.one.head.weight_quantizer.grid.bits == 8
    assert run.module.two.head.weight_quantizer.grid.bits == 4


def test_an_average_that_makes_norms_anew_does_not_go_with_learned_scales(tmp_path):
    swa = partial(StochasticWeightAveraging, swa_lrs=0.01)
    with pytest.raises(ConfigError, match=r"StochasticWeightAveraging .*EMAWeightAveraging"):
        train(tmp_path, swa, partial(QAT, scheme="w4a8_lsq"))


def test_another_scheme_for_a_model_that_has_one_is_refused(tmp_path):
    made = Stranger(Residual())
    train(tmp_path, QAT, module=lambda: made)
    with pytest.raises(ConfigError, match="quantized already, by another scheme"):
        train(tmp_path, partial(QAT, scheme="w4a8"), module=lambda: made)


def test_an_endless_training_needs_moments_in_steps(tmp_path):
    options = {"max_epochs": -1, "max_steps": -1}

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 8

    with pytest.raises(ConfigError, match=r"start=0\.5.*max_epochs"):
        train(tmp_path, Quantize, Stop, **options)
    steps = {"start": "2 steps", "freeze_observers": "4 steps", "freeze_batch_norm": None}
    run = train(tmp_path, partial(Quantize, **steps), Stop, **options)
    assert run.trainer.callbacks[0].is_settled


def test_a_training_that_ends_too_early_is_told(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 6

    with pytest.warns(UserWarning, match=r"ended at step 6, before ranges were final \(freeze_observers is step 12\)"):
        train(tmp_path, QAT, Stop)


def test_check_looks_at_a_network_and_a_length_before_there_is_a_trainer():
    length = Length(total_steps=100, steps_per_epoch=10)
    x, net = torch.zeros(2, 16), Residual()
    before = set(net.state_dict())
    Quantize().check(net, example_inputs=x, length=length)
    Quantize(example_inputs=x).check(net)
    with pytest.raises(ConfigError, match="exclude='haed'"):
        Quantize(exclude=["haed"]).check(net, example_inputs=x)
    with pytest.raises(ConfigError, match="freeze_observers='11 epochs'"):
        Quantize(freeze_observers="11 epochs").check(net, length=length)
    Quantize(method="post_training", start=0.0).check(
        net, example_inputs=x, length=Length(total_steps=0, steps_per_epoch=0)
    )
    assert set(net.state_dict()) == before
    assert type(net) is Residual
