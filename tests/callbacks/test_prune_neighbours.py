"""Pruning beside averages of weights, early stopping, Lightning's checkpoints and the guard against NaN."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from prune_job import SAMPLES, STEPS, Conv, Mlp, Stranger, fit, make_run

from lightning_opt.callbacks import NonFiniteGuard, Prune
from lightning_opt.checkpointing import SaveCheckpoints
from lightning_opt.pruning.structured import Structures
from lightning_opt.testing.resume import check_resume

pytestmark = pytest.mark.filterwarnings("ignore")
MASK = partial(Prune, start="1 steps", end="10 steps", every="1 steps", sparsity=0.75)
SHRINK = partial(Prune, Structures(round_to=1), sparsity=0.5, start="1 steps", end="5 steps", every="2 steps")


def train(tmp_path, *callbacks, **options):
    return fit(make_run(tmp_path, *callbacks, **{"save": False, **options}))


def share_of_zeros(net):
    weights = [p for p in net.parameters() if p.dim() > 1]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


AVERAGES = [
    partial(EMAWeightAveraging, decay=0.9),
    partial(StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=0.4, annealing_epochs=1),
]


@pytest.mark.parametrize("average", AVERAGES, ids=["ema", "swa"])
@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_masked_too(tmp_path, average, first):
    """What is left of the training is the average, with exactly the zeros that masks have."""
    callbacks = (MASK, average) if first else (average, MASK)
    run = train(tmp_path, *callbacks)
    prune = next(c for c in run.trainer.callbacks if isinstance(c, Prune))
    assert share_of_zeros(run.module.net) == pytest.approx(0.75, abs=0.01)
    for name, mask in prune._run.masks.as_dict().items():
        assert not bool(run.module.net.get_parameter(name)[~mask].any())
    average = next(c for c in run.trainer.callbacks if hasattr(c, "_average_model"))
    moved = average._average_model
    assert share_of_zeros(getattr(moved, "module", moved).net) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("average", AVERAGES, ids=["ema", "swa"])
def test_averages_shrink_along(tmp_path, average):
    run = train(tmp_path, average, SHRINK, module=lambda: Stranger(Conv()), features=16)
    assert run.module.net.one[0].out_channels == 8
    held = next(c for c in run.trainer.callbacks if hasattr(c, "_average_model"))._average_model
    assert getattr(held, "module", held).net.one[0].weight.shape == run.module.net.one[0].weight.shape


@pytest.mark.parametrize("pruner", [MASK, SHRINK], ids=["masks", "shrink"])
def test_stochastic_averages_resume_bit_equal(tmp_path, pruner):
    """After a stop, the average is cut before its values are restored. (Its scheduler's own count is one off then.)"""

    def make(folder):
        return make_run(folder, AVERAGES[1], pruner, module=lambda: Stranger(Conv()), features=16, max_epochs=4)

    check_resume(make, folder=tmp_path, stop_at_steps=[14], ignore=SWA_IS_OFF)


SWA_IS_OFF = [
    "callbacks.StochasticWeightAveraging.scheduler_state",
    "loops.fit_loop.epoch_loop.scheduler_progress",
    "lr_schedulers",
]


class Worse(Stranger):
    """Gets worse with each validation: early stopping would stop at once."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(float(self.trainer.global_step)))


def test_early_stopping_waits_for_the_end_and_then_has_all_its_patience(tmp_path):
    stopper = partial(EarlyStopping, "val/loss", patience=2)
    end = f"{2 * SAMPLES // 8 + 1} steps"  # within the third epoch
    alone = train(tmp_path, stopper, module=Worse, max_epochs=9)
    assert alone.trainer.current_epoch == 3
    run = train(tmp_path, stopper, partial(Prune, end=end), module=Worse, max_epochs=9)
    assert run.trainer.current_epoch == 5  # the third is the first that counts, two worse ones follow
    assert share_of_zeros(run.module.net) == pytest.approx(0.9, abs=0.01)
    assert "_should_skip_check" not in vars(run.trainer.early_stopping_callback)


def test_no_checkpoint_is_best_before_the_model_is_pruned(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    end = f"{2 * SAMPLES // 8 + 1} steps"
    callbacks = [
        partial(SaveCheckpoints, ours, monitor="val/loss", mode="min"),
        partial(ModelCheckpoint, theirs, monitor="val/loss", mode="min"),
        partial(Prune, end=end),
    ]
    run = train(tmp_path, *callbacks, module=Worse, max_epochs=5, enable_checkpointing=True)
    third = 3 * SAMPLES // 8
    for path in (ours / "best.ckpt", run.trainer.checkpoint_callbacks[1].best_model_path):
        saved = torch.load(path, weights_only=True)
        assert saved["global_step"] == third
        net = Mlp()
        net.load_state_dict({k.removeprefix("net."): v for k, v in saved["state_dict"].items()})
        assert share_of_zeros(net) == pytest.approx(0.9, abs=0.01)


def test_a_rollback_after_a_cut_finds_a_checkpoint_of_the_new_shapes(tmp_path):
    class Bad(Stranger):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_step == 6 else loss

    guard = partial(NonFiniteGuard, "rollback")
    run = fit(make_run(tmp_path, guard, SHRINK, module=lambda: Bad(Conv()), features=16, every_n_steps=100))
    assert run.trainer.callbacks[0].rollbacks == 1
    assert run.module.net.one[0].out_channels == 8


def test_a_rollback_brings_no_masked_weight_back(tmp_path):
    class Bad(Stranger):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_step == 14 else loss

    found = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            found.append((trainer.global_step, share_of_zeros(pl_module.net)))

    guard = partial(NonFiniteGuard, "rollback")
    run = make_run(tmp_path, guard, MASK, Look, module=Bad, every_n_steps=7)
    fit(run)
    rolled_back = dict(found)[15]
    assert run.trainer.callbacks[0].rollbacks == 1
    assert rolled_back == pytest.approx(0.75, abs=0.01)
    assert found[-1][0] == STEPS
