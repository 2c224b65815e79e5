"""Quantization-aware training beside averages, early stopping, checkpoints, pruning, teachers and compiled code."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from prune_job import SAMPLES, Stranger
from quantize_job import FREEZE, QAT, START, Residual, answers, converted, of, run_of, state_of, train
from torch import nn

from lightning_opt.callbacks import NonFiniteGuard, Prune, PruneDepth
from lightning_opt.checkpointing import SaveCheckpoints
from lightning_opt.errors import ConfigError
from lightning_opt.losses import KD, Term
from lightning_opt.modules import Distillation
from lightning_opt.pruning.structured import Structures
from lightning_opt.quantization.state import quantizers, weight_quantizers
from lightning_opt.surgery import recipe_of
from lightning_opt.tasks import Classification

pytestmark = pytest.mark.filterwarnings("ignore")
EMA = partial(EMAWeightAveraging, decay=0.9)
SWA = partial(StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=0.4, annealing_epochs=1)


class Averages(pl.Callback):
    """Averages the weights by hand, as the outside reference of EMA."""

    def __init__(self, into, decay=0.9):
        self.into, self.decay = into, decay

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, weight in pl_module.net.named_parameters():
            new = weight.detach().clone()
            old = self.into.get(name)
            self.into[name] = new if old is None else self.decay * old + (1 - self.decay) * new


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_lsq"])
def test_an_exponential_average_is_quantized_by_ranges_that_fit_it(tmp_path, first, scheme):
    """The last live ranges of activations, exactly; weights within the ranges that the average has."""
    live, expected = {}, {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            live.update(state_of(pl_module.net))

    qat = partial(QAT, scheme=scheme)
    callbacks = (qat, EMA) if first else (EMA, qat)
    run = train(tmp_path, Look, *callbacks, partial(Averages, expected))
    net = run.module.net
    for name, value in expected.items():
        if "quantizer" not in name:
            torch.testing.assert_close(net.get_parameter(name).detach(), value, msg=name)
    for name, value in state_of(net).items():
        is_activation = "weight_quantizer" not in name
        if name.endswith("zero_point") or (is_activation and not (scheme.endswith("lsq") and "scale" in name)):
            assert torch.equal(value, live[name]), name
    if scheme == "w8a8":
        for layer, quantizer in weight_quantizers(net):
            weight = layer.deployed_weight()[0]
            reach = weight.abs().flatten(1).amax(1)
            torch.testing.assert_close(quantizer.scale * 127, reach, rtol=0.2, atol=0)
    assert torch.equal(answers(converted(net)), answers(net))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.Identity])
def test_a_stochastic_average_is_quantized_by_ranges_that_fit_it(tmp_path, norm):
    run = train(tmp_path, QAT, SWA, module=lambda: Stranger(Residual(norm=norm)), max_epochs=4)
    net = run.module.net
    for layer, quantizer in weight_quantizers(net):
        reach = layer.deployed_weight()[0].detach().abs().flatten(1).amax(1)
        torch.testing.assert_close(quantizer.scale * 127, reach, rtol=1e-3, atol=1e-7)
    if norm is nn.BatchNorm2d:  # the last epoch, which SWA adds, finds the statistics of the average
        variances = net.stem[1].running_var
        assert not torch.equal(variances, torch.ones_like(variances))
    assert torch.equal(answers(converted(net)), answers(net))


class Worse(Stranger):
    """Gets worse with each validation: early stopping would stop at once."""

    def __init__(self):
        super().__init__(Residual())

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        self.log("val/loss", torch.tensor(float(self.trainer.global_step)))


END = f"{2 * SAMPLES // 8 + 1} steps"  # within the third epoch


def test_early_stopping_waits_until_ranges_are_final(tmp_path):
    stopper = partial(EarlyStopping, "val/loss", patience=2)
    qat = partial(QAT, freeze_observers=END, freeze_batch_norm=END)
    run = train(tmp_path, stopper, qat, module=Worse, max_epochs=9)
    assert run.trainer.current_epoch == 5  # the third is the first that counts, two worse ones follow
    assert "_should_skip_check" not in vars(run.trainer.early_stopping_callback)


def test_no_checkpoint_is_best_before_ranges_are_final(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    callbacks = [
        partial(SaveCheckpoints, ours, monitor="val/loss", mode="min"),
        partial(ModelCheckpoint, theirs, monitor="val/loss", mode="min"),
        partial(QAT, freeze_observers=END, freeze_batch_norm=END),
    ]
    run = train(tmp_path, *callbacks, module=Worse, max_epochs=5, enable_checkpointing=True)
    for path in (ours / "best.ckpt", run.trainer.checkpoint_callbacks[1].best_model_path):
        assert torch.load(path, weights_only=True)["global_step"] == 3 * SAMPLES // 8


@pytest.mark.parametrize("first", [True, False])
def test_masked_weights_are_zero_in_what_is_computed_and_in_the_integers(tmp_path, first):
    masks = partial(Prune, start="1 steps", end="10 steps", every="1 steps", sparsity=0.75)
    run = train(tmp_path, *((QAT, masks) if first else (masks, QAT)))
    masks, integers = of(run, Prune)._run.masks.as_dict(), converted(run.module.net)
    assert 0.7 < 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()) < 0.8
    for name, mask in masks.items():
        path = name.rpartition(".")[0]
        layer = run.module.net.get_submodule(path)
        assert not bool(layer.weight_quantizer(layer.deployed_weight()[0])[~mask].any()), name
        assert not bool(integers.get_submodule(path).weight.reshape(mask.shape)[~mask].any()), name


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_lsq"])
def test_structures_leave_between_insertion_and_start(tmp_path, scheme):
    shrink = partial(Prune, Structures(round_to=1), sparsity=0.5, start="1 steps", end="5 steps", every="2 steps")
    run = train(tmp_path, shrink, partial(QAT, scheme=scheme, start="8 steps"))
    net = run.module.net
    assert [edit.op for edit in recipe_of(net)] == ["quantize", "shrink", "quantize_on"]
    assert net.one[0].out_channels == 4
    assert net.one[0].weight_quantizer.scale.numel() == 4
    assert all(quantizer.is_fitted for quantizer in quantizers(net).values())
    assert torch.equal(answers(converted(net)), answers(net))


def test_structures_that_would_leave_after_start_are_refused(tmp_path):
    shrink = partial(Prune, Structures(round_to=1), sparsity=0.5, start="1 steps", end="9 steps", every="2 steps")
    with pytest.raises(ConfigError, match="shrink_at='9 steps' is step 9 and quantizers are switched on at step 6"):
        train(tmp_path, QAT, shrink)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(16, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.into(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_layers_that_would_leave_after_start_are_refused(tmp_path):
    depth = partial(PruneDepth, 1, at="7 steps", position="all")
    with pytest.raises(ConfigError, match="at='7 steps' is step 7"):
        train(tmp_path, QAT, depth, module=lambda: Stranger(Stack()))


def test_layers_leave_before_start(tmp_path):
    depth = partial(PruneDepth, 1, at="3 steps", position="all")
    run = train(tmp_path, QAT, depth, module=lambda: Stranger(Stack()))
    assert len(run.module.net.layers) == 3
    assert all(q.enabled for q in quantizers(run.module.net).values())


def test_the_teacher_stays_as_it_is(tmp_path):
    torch.manual_seed(1)
    teacher = Residual(width=12)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}

    def make():
        return Distillation(
            Residual(),
            teacher,
            task=Classification(num_outputs=4),
            losses=[Term(KD())],
            optimizer=partial(torch.optim.AdamW, lr=0.01),
        )

    run = train(tmp_path, QAT, module=make)
    assert not quantizers(teacher)
    assert before.keys() == teacher.state_dict().keys()
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    assert type(teacher) is Residual
    assert all(q.enabled for q in quantizers(run.module.model).values())


class Small(nn.Module):
    """A residual block of linear layers: quick to compile."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.two(x + torch.relu(self.one(x)))


def test_a_compiled_network_trains_as_an_eager_one(tmp_path):
    def compiled():
        made = Stranger(Small())
        made.net.compile(backend="eager")
        return made

    qat = partial(QAT, start="2 steps", freeze_observers="4 steps", freeze_batch_norm=None)
    options = {"max_epochs": 1, "limit_val_batches": 0}
    plain = train(tmp_path, qat, module=lambda: Stranger(Small()), **options)
    other = train(tmp_path, qat, module=compiled, **options)
    torch.testing.assert_close(torch.stack(plain.module.seen), torch.stack(other.module.seen), rtol=1e-4, atol=1e-5)
    for name, value in state_of(plain.module.net).items():
        torch.testing.assert_close(value, state_of(other.module.net)[name], rtol=1e-3, atol=1e-5, msg=name)
    assert other.module.net._compiled_call_impl is not None


def test_a_rollback_finds_a_checkpoint_of_the_model_that_rounds(tmp_path):
    class Bad(Stranger):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_step == START + 3 else loss

    guard = partial(NonFiniteGuard, "rollback")
    run = run_of(tmp_path, guard, partial(QAT, scheme="w4a4_lsq"), module=lambda: Bad(Residual()), every_n_steps=100)
    run.trainer.fit(run.module, **run.data)
    assert run.trainer.callbacks[0].rollbacks == 1
    assert all(float(q.scale.detach().max()) < 1 for q in quantizers(run.module.net).values())
    assert run.trainer.global_step >= FREEZE
