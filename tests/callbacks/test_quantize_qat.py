"""Quantization-aware training, phase by phase, and whatever the training does besides."""

import itertools
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from prune_job import STEPS, Stranger
from quantize_job import FREEZE, QAT, START, Residual, answers, converted, levels, module, of, state_of, train
from torch import nn

from lightning_opt.callbacks import Quantize
from lightning_opt.quantization.observers import MinMax
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import quantizers, weight_quantizers
from lightning_opt.surgery import recipe_of

pytestmark = pytest.mark.filterwarnings("ignore")


class Look(pl.Callback):
    """Calls a function with the step and the network after each batch."""

    def __init__(self, act):
        self.act = act

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.act(trainer.global_step, pl_module.net)


def test_before_start_the_training_is_the_one_without_quantizers(tmp_path):
    """To the bit while nothing is looked at; up to rounding in the last steps, which fold batch norms in to look."""
    plain, run = (
        train(tmp_path),
        train(tmp_path, partial(QAT, start="17 steps", freeze_observers=1.0, freeze_batch_norm=None)),
    )
    losses = torch.stack(plain.module.seen), torch.stack(run.module.seen)
    assert torch.equal(losses[0][:1], losses[1][:1])
    torch.testing.assert_close(losses[0][:17], losses[1][:17], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(losses[0][17:], losses[1][17:], rtol=1e-6, atol=1e-7)


@pytest.mark.support(method="qat", strategy="one", feature="trains")
def test_what_is_computed_lies_on_the_grids_from_start_on(tmp_path):
    seen = {}

    class Hook(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            def note(layer, args):
                seen[trainer.global_step] = args[0].detach()

            self.handle = pl_module.net.one[0].register_forward_pre_hook(note)

        def on_train_batch_end(self, *_):
            self.handle.remove()

    grid = Scheme.parse("w4a4")
    run = train(tmp_path, partial(QAT, scheme=grid), Hook)
    assert {step for step, x in seen.items() if len(x.unique()) > 16} == set(range(START))
    for layer, quantizer in weight_quantizers(run.module.net):
        assert levels(quantizer(layer.deployed_weight()[0])) <= 15
    assert [edit.op for edit in recipe_of(run.module.net)] == ["quantize", "quantize_on"]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_epochs": 6}], ids=str)
def test_ranges_are_those_that_training_has_shown(tmp_path, options):
    """The input's range by hand: the extremes of all batches from the first that is looked at to the last."""
    seen = []

    class Batches(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step < FREEZE:
                seen.append(batch[0])

    run = train(tmp_path, Batches, partial(QAT, scheme=Scheme(activation_observer=MinMax())), **options)
    assert len(seen) == FREEZE * options.get("accumulate_grad_batches", 1)
    x = torch.stack(seen)
    quantizer = run.module.net.stem[0].input_quantizer
    scale = (x.max() - x.min()) / 255
    torch.testing.assert_close(quantizer.scale, scale.reshape(1))
    assert int(quantizer.zero_point) == int((-x.min() / scale).round())


def test_nothing_is_looked_at_in_validation_or_the_sanity_check(tmp_path):
    """Validation data that are a thousand times larger leave no trace."""

    class Large(Stranger):
        def __init__(self, factor=1000):
            super().__init__(Residual(dropout=0.0))
            self.factor = factor

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch[0] * self.factor, batch[1]), batch_idx)

    plain = train(tmp_path, QAT, val_check_interval=2, module=lambda: Large(1))
    large = train(tmp_path, QAT, val_check_interval=2, module=Large)
    without = train(tmp_path, QAT, limit_val_batches=0, module=Large)
    for name, value in state_of(plain.module.net).items():
        assert torch.equal(value, state_of(large.module.net)[name]), name
        assert torch.equal(value, state_of(without.module.net)[name]), name


def test_what_is_frozen_stays(tmp_path):
    states, norms = {}, {}

    def note(step, net):
        states[step] = state_of(net)
        norms[step] = net.stem[1].running_mean.clone(), net.stem[1].weight.detach().clone()

    train(tmp_path, partial(QAT, freeze_batch_norm="14 steps"), partial(Look, note))
    ranges = [name for name in states[1] if name.endswith("scale")]
    for step, later in itertools.pairwise(range(START, STEPS + 1)):
        changed = [name for name in ranges if not torch.equal(states[step][name], states[later][name])]
        # at the freeze itself weights get the range that they have by then
        assert bool(changed) == (later <= FREEZE), step
    for step, later in itertools.pairwise(range(1, STEPS + 1)):
        assert torch.equal(norms[step][0], norms[later][0]) == (step >= 14), step
        assert not torch.equal(norms[step][1], norms[later][1])


def test_learned_scales_learn_after_the_freeze_too(tmp_path):
    states = {}
    qat = partial(QAT, scheme="w4a4_lsq")
    train(tmp_path, qat, partial(Look, lambda step, net: states.update({step: state_of(net)})))
    scales = [name for name in states[1] if name.endswith("scale")]
    assert all(torch.equal(states[1][name], states[START - 1][name]) for name in scales)  # untouched before
    for name in scales:
        assert not torch.equal(states[START][name], states[FREEZE][name]), name
        assert not torch.equal(states[FREEZE][name], states[STEPS][name]), name
        assert bool((states[STEPS][name] > 0).all()), name


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2, "max_epochs": 6},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "precision": "bf16-mixed"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"val_check_interval": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_lsq"])
def test_whatever_the_training_does_the_model_converts(tmp_path, options, scheme):
    run = train(tmp_path, partial(QAT, scheme=scheme), **options)
    net = run.module.net
    assert of(run).is_settled
    assert run.trainer.global_step == STEPS
    assert all(q.enabled and q.is_fitted and not q.observing for q in quantizers(net).values())
    assert bool(torch.stack(run.module.seen).isfinite().all())
    if "true" not in options.get("precision", ""):
        assert torch.equal(answers(converted(net)), answers(net))
    # ranges are in float32 or better whatever the weights are in, so that moving averages move
    assert all(q.scale.element_size() >= 4 for q in quantizers(net).values()) or options["precision"] == "bf16-true"


class Manual(Stranger):
    """Two optimizers that step by themselves."""

    def __init__(self):
        super().__init__(Residual())
        self.automatic_optimization = False

    def configure_optimizers(self):
        parts = [self.net.stem, self.net.one, self.net.two], [self.net.head]
        return [torch.optim.SGD(itertools.chain(*(p.parameters() for p in part)), lr=0.05) for part in parts]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8_lsq"])
def test_modules_that_optimize_by_themselves(tmp_path, scheme):
    run = train(tmp_path, partial(QAT, scheme=scheme), module=Manual)
    assert of(run).is_settled
    assert torch.equal(answers(converted(run.module.net)), answers(run.module.net))


def test_layers_that_are_named_stay_in_float(tmp_path):
    run = train(tmp_path, partial(QAT, exclude=["head", "stem.*"]))
    assert {name.rpartition(".")[0] for name in quantizers(run.module.net) if "weight" in name} == {"one.0", "two.0"}


class Odd(nn.Module):
    """Has a layer that nobody knows how to round, and one that training never uses."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.body(x))
        return self.head(self.recurrent(x[:, None])[0][:, 0])


def test_layers_that_cannot_be_quantized_are_named_in_one_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"stay in float: .*recurrent") as warned:
        run = train(tmp_path, QAT, module=lambda: Stranger(Odd()))
    assert sum("stay in float" in str(one.message) for one in warned) == 1
    assert {name.partition(".")[0] for name in quantizers(run.module.net) if "weight" in name} == {"body", "head"}


def test_stages_and_settled(tmp_path):
    told = []
    callback = QAT()

    def note(step, net):
        told.append((callback.is_settled, len(callback.stages())))

    train(tmp_path, lambda: callback, partial(Look, note))
    assert [settled for settled, _ in told] == [step >= FREEZE for step in range(1, STEPS + 1)]
    assert [count for _, count in told] == [int(step >= START) for step in range(1, STEPS + 1)]
    (stage,) = callback.stages()
    assert (stage["method"], stage["from_step"], stage["to_step"]) == ("quantize", START, STEPS)
    assert stage["what"].startswith("w8a8: quantization-aware training, 4 weights")


def test_a_second_fit_goes_on_with_the_quantizers_that_are_there(tmp_path):
    made = module()
    first = train(tmp_path, QAT, module=lambda: made)
    before = state_of(made.net)
    again = train(tmp_path, partial(QAT, start="1 steps", freeze_observers="1 steps"), module=lambda: made)
    assert [edit.op for edit in recipe_of(made.net)] == ["quantize", "quantize_on"]
    after = state_of(made.net)
    assert before.keys() == after.keys()
    assert of(first).is_settled
    assert of(again).is_settled


def test_a_callback_can_be_used_alone_from_python(tmp_path):
    """As in the readme: any LightningModule, nothing but the callback."""
    run = train(tmp_path, Quantize)
    assert of(run).phases.start == STEPS // 2
    assert of(run).is_settled
