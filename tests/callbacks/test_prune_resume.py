"""A pruned run that was stopped, before, inside and after its schedule and shrink, ends bit-equal."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from prune_job import STEPS, Conv, Stranger, fit, make_run

from lightning_opt.callbacks import Prune
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.allocation import GlobalAllocation
from lightning_opt.pruning.criteria import FirstOrder, Movement, Random, Taylor, Wanda
from lightning_opt.pruning.regrow import RigL
from lightning_opt.pruning.schedules import Iterative, OneShot
from lightning_opt.pruning.solvers import SparseGPT
from lightning_opt.pruning.structured import Structures
from lightning_opt.testing.resume import check_resume

pytestmark = pytest.mark.filterwarnings("ignore")
START, END = 2, 13  # of 18 steps, with the defaults
LONG = {"every": "2 steps", "observe_steps": 2}


@pytest.mark.support(method="unstructured", strategy="one", feature="resume")
@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"every": "1 steps"}, [END - 1, (START - 1, START, 7, END, STEPS - 1)]),
        ({"criterion": Taylor(), **LONG}, [(2, 5)]),  # between updates: half of the evidence is in the checkpoint
        ({"criterion": Movement(), "allocation": GlobalAllocation(), **LONG}, [(1, 8)]),
        ({"criterion": Wanda(), **LONG}, [(5, 6)]),
        ({"criterion": Random(), "schedule": OneShot(), "start": 0.0, "regrow": RigL(), **LONG}, [(5, 10)]),
        ({"schedule": Iterative(rounds=3, rewind_to=0.1), "start": 0.0, "every": "1 steps"}, [(1, 9)]),
        ({"solver": SparseGPT(), "schedule": OneShot(), "start": "6 steps", "end": "6 steps"}, [(5, 6)]),
    ],
    ids=["magnitude", "taylor", "movement", "wanda", "rigl", "lottery", "sparse_gpt"],
)
def test_masks_resume_bit_equal(tmp_path, options, stops):
    check_resume(lambda folder: make_run(folder, partial(Prune, **options)), folder=tmp_path, stop_at_steps=stops)


SHRINK = {"pattern": Structures(round_to=1), "sparsity": 0.5, "start": "2 steps", "every": "3 steps"}


def conv_run(folder, *callbacks, **options):
    return make_run(folder, *callbacks, module=lambda: Stranger(Conv()), features=16, **options)


@pytest.mark.support(method="structured", strategy="one", feature="resume")
@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"end": "8 steps", "shrink_at": "10 steps"}, [(1, 7, 9, 10, 11)]),
        ({"end": "8 steps", "criterion": FirstOrder(normalize="mean"), "allocation": "global"}, [(6, 12)]),
    ],
    ids=["norm", "first_order"],
)
def test_structures_resume_bit_equal(tmp_path, options, stops):
    prune = partial(Prune, **{**SHRINK, **options})
    check_resume(lambda folder: conv_run(folder, prune), folder=tmp_path, stop_at_steps=stops)


def test_structures_then_weights_and_an_average_resume_bit_equal(tmp_path):
    callbacks = [
        partial(EMAWeightAveraging, decay=0.5),  # before the pruners, which it knows nothing of
        partial(Prune, **SHRINK, end="6 steps"),
        partial(Prune, start="4 steps", end="12 steps", every="2 steps"),
    ]
    check_resume(lambda folder: conv_run(folder, *callbacks), folder=tmp_path, stop_at_steps=[(5, 8)])


class Forgetful(Prune):
    def state_dict(self):
        return {}


class ForgetsEvidence(Prune):
    def state_dict(self):
        return {**super().state_dict(), "statistics": []}


@pytest.mark.parametrize(
    ("kind", "options", "stop"), [(Forgetful, {}, END + 1), (ForgetsEvidence, {"criterion": Taylor(), **LONG}, 5)]
)
def test_without_its_state_it_is_another_run(tmp_path, kind, options, stop):
    """The negative control: the comparison sees masks and evidence that were lost."""
    with pytest.raises(AssertionError, match=r"values differ.*exp_avg"):
        check_resume(lambda folder: make_run(folder, partial(kind, **options)), folder=tmp_path, stop_at_steps=[stop])


class KeepsTrack(pl.Callback):
    def __init__(self, into):
        self.into = into

    def on_train_start(self, trainer, pl_module):
        self.into.append([id(p) for p in pl_module.parameters()])

    def on_train_end(self, trainer, pl_module):
        self.into.append([id(p) for p in pl_module.parameters()])


def test_parameters_stay_the_same_objects(tmp_path):
    seen = []
    fit(conv_run(tmp_path, partial(Prune, **SHRINK), partial(KeepsTrack, seen), save=False))
    assert seen[0] == seen[1]


def test_a_checkpoint_of_another_pruner_is_refused(tmp_path):
    fit(make_run(tmp_path, Prune))
    with pytest.raises(ConfigError, match="masks would be lost"):
        fit(make_run(tmp_path, partial(Prune, exclude=["5"])), resume=tmp_path / "last.ckpt")


def test_sparsity_is_of_the_original_weights_however_often_and_after_a_resume(tmp_path):
    run = fit(make_run(tmp_path, partial(Prune, every="1 steps"), max_epochs=3))
    weights = [p for p in run.module.net.parameters() if p.dim() > 1]
    total = sum(p.numel() for p in weights)
    zeros = sum(int((p == 0).sum()) for p in weights)
    assert abs(zeros - 0.9 * total) <= len(weights)  # one rounding a layer
    # three epochs more, with moments that are kept as they were: the same masks, not nine tenths of what was left
    before = [p == 0 for p in weights]
    longer = fit(make_run(tmp_path, partial(Prune, every="1 steps"), max_epochs=6), resume=tmp_path / "last.ckpt")
    after = [p == 0 for p in longer.module.net.parameters() if p.dim() > 1]
    assert longer.trainer.global_step == 2 * STEPS
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
