"""A quantized run that was stopped before, inside and after its phases ends bit-equal, and so do its integers."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from prune_job import STEPS, fit, make_run
from quantize_job import FREEZE, QAT, START, answers, converted, module, of, run_of, state_of

from lightning_opt.callbacks import Prune, Quantize
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.structured import Structures
from lightning_opt.quantization.observers import Percentile
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import set_observing
from lightning_opt.testing.resume import check_resume

pytestmark = pytest.mark.filterwarnings("ignore")
EDGES = (1, START - 1, START, START + 2, FREEZE - 1, FREEZE, STEPS - 1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.support(method="qat", strategy="one", feature="resume")
@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, [EDGES]),
        ({"scheme": "w4a4_lsq"}, [(START - 2, START, FREEZE + 1)]),
        ({"scheme": "w4a8", "freeze_batch_norm": "14 steps"}, [(START + 1, FREEZE, 15)]),
        ({"scheme": Scheme(activation_observer=Percentile(q=0.99))}, [(START - 1, START + 1)]),
    ],
    ids=["min_max", "lsq", "later_norm", "percentile"],
)
def test_it_resumes_bit_equal(tmp_path, options, stops):
    check_resume(lambda folder: run_of(folder, partial(QAT, **options)), folder=tmp_path, stop_at_steps=stops)


def test_with_pruned_structures_and_an_average_it_resumes_bit_equal(tmp_path):
    callbacks = [
        partial(EMAWeightAveraging, decay=0.5),
        partial(QAT, start="8 steps"),
        partial(Prune, Structures(round_to=1), sparsity=0.5, start="1 steps", end="5 steps", every="2 steps"),
    ]
    check_resume(lambda folder: run_of(folder, *callbacks), folder=tmp_path, stop_at_steps=[(3, 9, FREEZE + 1)])


class ForgetsPhases(Quantize):
    """Goes on as a run that is told of no phase: quantizers round, and look at nothing."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        if trainer.global_step:
            set_observing(pl_module.net, False)


class ForgetsFreeze(Quantize):
    """Observes again what was final."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        if trainer.global_step:
            set_observing(pl_module.net, True)


class ForgetsRanges(Quantize):
    """Begins anew to look at activations."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        for quantizer in self._run._watched():
            quantizer.observer = quantizer.spec.start(quantizer.grid)


@pytest.mark.parametrize(
    ("kind", "stop"),
    [(ForgetsPhases, START + 1), (ForgetsFreeze, FREEZE + 1), (ForgetsRanges, START - 1), (ForgetsRanges, START + 2)],
)
def test_without_its_state_it_is_another_run(tmp_path, kind, stop):
    """The negative control: the comparison sees phases and ranges that were lost."""
    moments = {"start": START, "freeze_observers": FREEZE, "freeze_batch_norm": FREEZE}
    forgetful = partial(kind, **{name: f"{step} steps" for name, step in moments.items()})
    with pytest.raises(AssertionError, match=r"values differ"):
        check_resume(lambda folder: run_of(folder, forgetful), folder=tmp_path, stop_at_steps=[stop])


def test_moments_are_those_of_the_checkpoint_whatever_is_written_now(tmp_path):
    def make(folder):
        is_resumed = folder.name == "stopped-0" and any(folder.glob("*.ckpt"))
        return run_of(folder, partial(QAT, start="9 steps") if is_resumed else QAT)

    check_resume(make, folder=tmp_path, stop_at_steps=[3])


def test_what_is_converted_from_a_checkpoint_of_a_finished_fit_is_bit_equal(tmp_path):
    run = fit(run_of(tmp_path, QAT))
    expected = answers(converted(run.module.net))
    assert torch.equal(answers(run.module.net), expected)
    fresh = run_of(tmp_path, QAT)
    fresh.trainer.validate(fresh.module, **fresh.data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(answers(converted(fresh.module.net)), expected)
    # the control: another scheme's integers are others
    other = fit(run_of(tmp_path / "other", partial(QAT, scheme="w4a8")))
    assert not torch.equal(answers(converted(other.module.net)), expected)


def test_a_finished_fit_that_is_started_again_is_as_it_was(tmp_path):
    first = fit(run_of(tmp_path, QAT))
    again = fit(run_of(tmp_path, QAT), resume=tmp_path / "last.ckpt")
    assert of(again).is_settled
    for name, value in state_of(first.module.net).items():
        assert torch.equal(value, state_of(again.module.net)[name]), name


def test_a_checkpoint_of_another_scheme_is_refused(tmp_path):
    fit(run_of(tmp_path, QAT))
    with pytest.raises(ConfigError, match="was changed in another way"):
        fit(run_of(tmp_path, partial(QAT, scheme="w4a8")), resume=tmp_path / "last.ckpt")


def test_a_checkpoint_of_another_place_is_refused(tmp_path):
    fit(make_run(tmp_path, QAT))
    with pytest.raises(ConfigError, match="Quantize"):
        fit(make_run(tmp_path, partial(QAT, module="net")), resume=tmp_path / "last.ckpt")


def test_a_strangers_module_keeps_the_names_of_its_weights(tmp_path):
    before = set(module().state_dict())
    fit(run_of(tmp_path, QAT))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert before < set(saved["state_dict"])
    assert all("quantizer" in name for name in set(saved["state_dict"]) - before)
    assert list(saved["recipes"]) == ["net"]
    assert [name for name in ("quantize", "quantize_on") if f'"op":"{name}"' in saved["recipes"]["net"]] == [
        "quantize",
        "quantize_on",
    ]
