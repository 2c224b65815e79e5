"""Structures are masked, then leave the model in mid-fit: training goes on as if they were only masked."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from prune_job import BATCH, SAMPLES, Conv, Stranger, fit, make_run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_opt.callbacks import Prune
from lightning_opt.errors import ConfigError
from lightning_opt.losses import FitNets, Term
from lightning_opt.modules import Distillation
from lightning_opt.pruning.criteria import Activation, BatchNormScale
from lightning_opt.pruning.schedules import OneShot
from lightning_opt.pruning.structured import Structures
from lightning_opt.surgery import recipe_of, replay
from lightning_opt.tasks import Classification

pytestmark = pytest.mark.filterwarnings("ignore")
HALF = {"pattern": Structures(round_to=1), "sparsity": 0.5, "start": "2 steps", "end": "6 steps", "every": "2 steps"}


def train(tmp_path, *callbacks, module=None, **options):
    module = module or (lambda: Stranger(Conv()))
    return fit(make_run(tmp_path, *callbacks, module=module, features=16, save=False, **options))


def params_of(net):
    return sum(p.numel() for p in net.parameters())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


@pytest.mark.support(method="structured", strategy="one", feature="trains")
@pytest.mark.parametrize(
    ("options", "make"),
    [({}, None), ({}, sgd), ({"accumulate_grad_batches": 2}, None)],
    ids=["adamw", "momentum", "accumulation"],
)
def test_losses_after_the_shrink_are_those_of_the_masked_dense_model(tmp_path, options, make):
    """The outside reference: the same run that only masks to the end. Moments must be carried for this to hold."""
    runs = {}
    for shrink_at in ("8 steps" if not options else "7 steps", 1.0):
        prune = partial(Prune, **HALF, shrink_at=shrink_at)
        run = train(tmp_path, prune, module=lambda: Stranger(Conv(), make=make), **options)
        runs[shrink_at] = run
    (shrunk, masked) = runs.values()
    losses = [torch.stack(run.module.seen) for run in (shrunk, masked)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    # both end in the same small model
    assert params_of(shrunk.module.net) == params_of(masked.module.net) < 0.4 * params_of(Conv())
    # (a bias before batch norm has no gradient but noise, which Adam makes large: answers by batch statistics)
    x = torch.randn(16, 16)
    torch.testing.assert_close(shrunk.module.net.train()(x), masked.module.net.train()(x), rtol=1e-4, atol=1e-4)


def test_without_moments_the_losses_differ(tmp_path):
    """The control of the test above: it sees moments that were dropped."""

    class Forget(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 8:
                trainer.optimizers[0].state.clear()

    losses = [
        torch.stack(train(tmp_path, partial(Prune, **HALF, shrink_at="8 steps"), *more).module.seen)
        for more in ((), (Forget,))
    ]
    assert float((losses[0] - losses[1]).abs().max()) > 1e-3


def test_the_recipe_gives_a_fresh_model_the_same_shapes_and_is_in_the_checkpoint(tmp_path):
    run = fit(make_run(tmp_path, partial(Prune, **HALF), module=lambda: Stranger(Conv()), features=16))
    fresh = replay(Conv(), recipe_of(run.module.net))
    fresh.load_state_dict(run.module.net.state_dict())
    x = torch.randn(3, 16)
    torch.testing.assert_close(fresh.eval()(x), run.module.net.eval()(x))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["recipes"] == {"net": recipe_of(run.module.net).to_json()}
    # the trainer can judge a checkpoint with a module that was built dense
    again = make_run(tmp_path, partial(Prune, **HALF), module=lambda: Stranger(Conv()), features=16)
    again.trainer.validate(again.module, **again.data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert params_of(again.module.net) == params_of(run.module.net)


@pytest.mark.parametrize("of", ["params", "flops"])
def test_the_share_may_be_of_parameters_or_operations(tmp_path, of):
    net = Conv()
    run = train(tmp_path, partial(Prune, **{**HALF, "sparsity": 0.6}, of=of), module=lambda: Stranger(net))

    def count(model):
        if of == "params":
            return params_of(model)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 16))
        return counter.get_total_flops()

    assert 0.3 <= count(run.module.net) / count(Conv()) <= 0.4


def test_widths_are_rounded_and_names_excluded(tmp_path):
    options = {**HALF, "pattern": Structures(round_to=4), "sparsity": 0.6}
    run = train(tmp_path, partial(Prune, **options, exclude=["stem.*"]))
    assert run.module.net.stem[0].out_channels == 8
    assert run.module.net.one[0].out_channels == 8  # 6.4 of 16, to a multiple of 4


def test_structures_then_weights(tmp_path):
    """The second pruner's masks follow the first one's cut; its sparsity is of the weights that are left."""
    run = train(
        tmp_path, partial(Prune, **HALF), partial(Prune, start="4 steps", end="12 steps", every="2 steps", sparsity=0.8)
    )
    weights = [p for p in run.module.net.parameters() if p.dim() > 1]
    assert params_of(run.module.net) < 0.4 * params_of(Conv())
    zeros = sum(int((p == 0).sum()) for p in weights)
    assert abs(zeros - 0.8 * sum(p.numel() for p in weights)) <= len(weights)
    assert [stage["method"] for c in run.trainer.callbacks if isinstance(c, Prune) for stage in c.stages()] == [
        "prune",
        "shrink",
        "prune",
    ]


def test_inputs_are_observed_for_structures(tmp_path):
    run = train(tmp_path, partial(Prune, **HALF, criterion=Activation(), observe_steps=1))
    assert params_of(run.module.net) < 0.4 * params_of(Conv())


def test_the_penalty_is_that_of_network_slimming_until_the_cut(tmp_path):
    """SGD without anything else: each step moves each scale by lr * strength * sign more."""
    scales = {}
    for penalty in (0.0, 0.01):

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_, penalty=penalty):
                if trainer.global_step == 1:
                    scales[penalty] = pl_module.net.stem[1].weight.detach().clone()

        options = {"criterion": BatchNormScale(), "schedule": OneShot(), "allocation": "global"}
        pattern = {**HALF, "start": "6 steps", "penalty": penalty, **options}
        run = train(
            tmp_path,
            partial(Prune, **pattern),
            Look,
            module=lambda: Stranger(Conv(), make=partial(torch.optim.SGD, lr=0.5)),
        )
        assert params_of(run.module.net) < params_of(Conv())
    torch.testing.assert_close(scales[0.0] - scales[0.01], torch.full((8,), 0.5 * 0.01), rtol=1e-4, atol=1e-7)


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Conv()

    def forward(self, x):
        return self.conv(x)


def test_what_a_loss_compares_with_a_teacher_keeps_its_width(tmp_path):
    """A projector was made for the tapped module's channels; the other ones go."""

    def module():
        torch.manual_seed(0)
        return Distillation(
            Digits(),
            Conv(width=12),
            task=Classification(num_outputs=4),
            losses=[Term(FitNets(layers={"conv.stem": "stem"}))],
            optimizer=partial(torch.optim.AdamW, lr=0.01),
        )

    run = train(tmp_path, partial(Prune, **HALF), module=module, num_sanity_val_steps=0, limit_val_batches=0)
    assert run.module.model.conv.stem[0].out_channels == 8
    assert run.module.model.conv.one[0].out_channels == 8  # of 16
    assert run.trainer.global_step == 3 * SAMPLES // BATCH


def test_a_compiled_network_shrinks_and_trains_on(tmp_path):
    def module():
        made = Stranger(Conv())
        made.net.compile(backend="eager")
        return made

    plain = train(tmp_path, partial(Prune, **HALF, shrink_at="8 steps"))
    compiled = train(tmp_path, partial(Prune, **HALF, shrink_at="8 steps"), module=module)
    torch.testing.assert_close(torch.stack(plain.module.seen), torch.stack(compiled.module.seen), rtol=1e-4, atol=1e-5)


def test_params_are_logged_at_the_cut(tmp_path):
    run = train(tmp_path, partial(Prune, **HALF, shrink_at="8 steps"))
    assert float(run.trainer.callback_metrics["student/params"]) == params_of(run.module.net)
    gone = 1 - params_of(run.module.net) / params_of(Conv())
    assert float(run.trainer.callback_metrics["student/sparsity"]) == pytest.approx(gone)


def test_an_optimizer_whose_state_cannot_be_cut_is_refused(tmp_path):
    seen = []

    def module():
        seen.append(Stranger(Conv(), make=torch.optim.Adafactor))
        return seen[0]

    with pytest.raises(ConfigError, match="Adafactor"):
        train(tmp_path, partial(Prune, **HALF), module=module)
    assert seen[0].seen == []  # before the first step, not at the cut
