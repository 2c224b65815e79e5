"""What cannot work is refused before training, with a sentence that names the argument, the value and what to do."""

from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from prune_job import Conv, Mlp, Stranger, fit, make_run
from torch import nn

from lightning_opt.callbacks import Prune
from lightning_opt.callbacks.moments import Length
from lightning_opt.callbacks.prune_target import refuse_strategy
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.allocation import ERK, PerLayer
from lightning_opt.pruning.criteria import BatchNormScale, GroupNorm, Snip, Wanda
from lightning_opt.pruning.patterns import NM, Block, Element
from lightning_opt.pruning.regrow import RigL
from lightning_opt.pruning.schedules import OneShot
from lightning_opt.pruning.solvers import SparseGPT
from lightning_opt.pruning.structured import Structures

pytestmark = pytest.mark.filterwarnings("ignore")
CHANNELS = Structures(round_to=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity=1\.0"),
        ({"sparsity": 0.0}, r"sparsity=0\.0"),
        ({"sparsity": -0.5}, r"sparsity=-0\.5"),
        ({"sparsity": 90}, "sparsity=90"),
        ({"start": 0.8, "end": 0.5}, r"end=0\.5 comes before start=0\.8"),
        ({"start": "9 steps", "end": "3 steps"}, "end='3 steps' comes before start='9 steps'"),
        ({"start": "sometime"}, "start='sometime'"),
        ({"every": 2.0}, r"every=2\.0"),
        ({"shrink_at": 0.9}, r"shrink_at=0\.9: only a pattern of Structures"),
        ({"include": "conv"}, "include='conv': give a list"),
        ({"observe_steps": 0}, "observe_steps=0"),
        ({"penalty": -1.0}, r"penalty=-1\.0"),
        ({"of": "weights"}, "of='weights'"),
        ({"of": "flops"}, "of='flops' does not go with pattern=Element"),
        ({"pattern": "2:4"}, "pattern='2:4'"),
        ({"criterion": GroupNorm()}, "criterion=GroupNorm.* does not go with pattern=Element"),
        ({"allocation": "uniform"}, "allocation='uniform' does not go with pattern=Element"),
        ({"pattern": CHANNELS, "allocation": ERK()}, "allocation=ERK"),
        ({"pattern": CHANNELS, "regrow": RigL()}, "regrow=RigL"),
        ({"pattern": NM(2, 4), "regrow": RigL()}, "regrow=RigL"),
        ({"pattern": CHANNELS, "solver": SparseGPT()}, "solver=SparseGPT"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Prune(**options)


class Choosy(nn.Module):
    """Its program depends on its data."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.layers(x) if float(x.sum()) > 0 else self.layers(-x)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (Mlp, {"include": ["layrs.*"]}, r"include='layrs\.\*' matches none.*near names: .*weight"),
        (Mlp, {"exclude": ["7"]}, "exclude='7' matches none"),
        (Mlp, {"include": ["0"], "exclude": ["0"]}, "no weight of Mlp is left to prune"),
        (partial(Mlp, 18), {"pattern": NM(2, 4)}, r"3\.weight.*divisible by 4, it is 18.*exclude=\[3\.weight\]"),
        (partial(Mlp, 18), {"pattern": Block(4, 1)}, r"divisible by 4, it is 18"),
        (Mlp, {"pattern": NM(2, 64)}, "all of .* have fewer than 64 inputs"),
        (Mlp, {"allocation": PerLayer(sparsities={"head": 0.5})}, "head"),
        (Mlp, {"module": "nett"}, "module='nett' is no part of Stranger; near names: net"),
        (Conv, {"pattern": CHANNELS, "include": ["stam"]}, "include='stam'.*near names: stem"),
        (Conv, {"pattern": CHANNELS, "sparsity": 0.99}, r"sparsity=0\.99.*would leave nothing"),
        (Conv, {"pattern": Structures(round_to=64)}, "round_to=64.*nothing would go"),
        (Conv, {"pattern": Structures(kinds=["heads"])}, "kinds.*heads"),
        (Mlp, {"pattern": CHANNELS, "criterion": BatchNormScale()}, "criterion=BatchNormScale.*batch norm"),
        (Mlp, {"penalty": 0.1}, "penalty: .*batch norm"),
        (Choosy, {"pattern": CHANNELS}, "Choosy cannot be traced"),
        (Mlp, {"criterion": Snip(), "schedule": OneShot(), "start": 0.0}, "start.*'1 steps'"),
        (Mlp, {"end": "19 steps"}, "end='19 steps' is step 19, and training ends at step 18"),
        (Mlp, {"end": "4 epochs"}, "end='4 epochs' is step 24"),
        (Mlp, {"start": "2 epochs", "end": 0.5}, r"end=0\.5 \(step 9\) comes before start='2 epochs' \(step 12\)"),
    ],
)
def test_before_the_first_step(tmp_path, net, options, message):
    features = 16 if net in (Conv, Choosy) else 8
    run = make_run(tmp_path, partial(Prune, **options), module=lambda: Stranger(net()), features=features, save=False)
    with pytest.raises(ConfigError, match=message):
        fit(run)
    assert run.module.seen == []


def test_a_weight_without_inputs_is_refused_for_criteria_that_read_them(tmp_path):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])

    run = make_run(tmp_path, partial(Prune, criterion=Wanda()), module=lambda: Stranger(Text()), save=False)
    with pytest.raises(ConfigError, match=r"Wanda reads the inputs.*exclude=\[attention.in_proj_weight\]"):
        fit(run)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_are_not_known_are_refused_by_name(kind):
    trainer = SimpleNamespace(strategy=kind.__new__(kind))
    with pytest.raises(ConfigError, match=f"strategy={kind.__name__}.*strategy=fsdp2"):
        refuse_strategy(trainer, shrinks=False)


def test_an_endless_training_needs_moments_in_steps(tmp_path):
    options = {"max_epochs": -1, "max_steps": -1}

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 8

    with pytest.raises(ConfigError, match=r"start=0\.1.*max_epochs"):
        fit(make_run(tmp_path, Prune, Stop, save=False, **options))
    steps = {"start": "2 steps", "end": "6 steps", "every": "2 steps"}
    run = fit(make_run(tmp_path, partial(Prune, **steps), Stop, save=False, **options))
    assert run.trainer.callbacks[0].is_settled


def test_a_training_that_ends_too_early_is_told(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 6

    with pytest.warns(UserWarning, match=r"ended at step 6, before pruning was over \(step 13\)"):
        fit(make_run(tmp_path, Prune, Stop, save=False))


def test_check_looks_at_a_network_and_a_length_before_there_is_a_trainer():
    length = Length(total_steps=100, steps_per_epoch=10)
    Prune(NM(2, 4)).check(Mlp(), length=length)
    with pytest.raises(ConfigError, match="divisible by 4, it is 18"):
        Prune(NM(2, 4)).check(Mlp(18))
    with pytest.raises(ConfigError, match="end='11 epochs'"):
        Prune(Element(), end="11 epochs").check(Mlp(), length=length)
    net = Conv()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    with pytest.raises(ConfigError, match="would leave nothing"):
        Prune(CHANNELS, sparsity=0.99).check(net, example_inputs=torch.zeros(2, 16))
    Prune(CHANNELS, sparsity=0.5).check(net, example_inputs=torch.zeros(2, 16))
    assert shapes == {name: p.shape for name, p in net.named_parameters()}
