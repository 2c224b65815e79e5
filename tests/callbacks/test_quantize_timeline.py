"""Moments of quantization-aware training as optimizer steps."""

import pytest

from lightning_opt.callbacks.moments import Length
from lightning_opt.callbacks.quantize_timeline import WARM_UP_STEPS, Phases, When
from lightning_opt.errors import ConfigError

HUNDRED = Length(total_steps=100, steps_per_epoch=10)


def when(start=0.5, freeze_observers=0.8, freeze_batch_norm=0.8):
    return When.read(start=start, freeze_observers=freeze_observers, freeze_batch_norm=freeze_batch_norm)


@pytest.mark.parametrize(
    ("moments", "steps"),
    [
        ({}, (34, 50, 80, 80)),
        ({"start": "5 epochs", "freeze_observers": "6 epochs", "freeze_batch_norm": None}, (34, 50, 60, None)),
        ({"start": "3 steps", "freeze_observers": "9 steps", "freeze_batch_norm": 1.0}, (0, 3, 9, 100)),
        (
            {"start": 0.0, "freeze_observers": 0.0, "freeze_batch_norm": 0.0},
            (0, 1, 1, 1),
        ),  # one step is looked at first
    ],
)
def test_moments_become_steps(moments, steps):
    observe, start, freeze, norm = steps
    assert when(**moments).resolve(HUNDRED) == Phases(
        observe=observe, start=start, freeze_observers=freeze, freeze_batch_norm=norm, total=100
    )


def test_what_is_done_at_each_step():
    phases = when(start="20 steps", freeze_observers="30 steps", freeze_batch_norm="40 steps").resolve(HUNDRED)
    assert [s for s in range(101) if phases.observes(s)] == list(range(20 - WARM_UP_STEPS, 30))
    assert [s for s in range(101) if phases.is_on(s)] == list(range(20, 101))
    assert [s for s in range(101) if phases.is_settled(s)] == list(range(30, 101))
    assert [s for s in range(101) if phases.holds_batch_norm(s)] == list(range(40, 101))
    assert Phases(**phases.to_state()) == phases


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"start": 0.9}, r"freeze_observers=0\.8 comes before start=0\.9"),
        ({"freeze_batch_norm": 0.1}, r"freeze_batch_norm=0\.1 comes before start=0\.5"),
        ({"start": 1.5}, r"start=1\.5"),
        ({"freeze_observers": "late"}, "freeze_observers='late'"),
    ],
)
def test_what_is_wrong_whatever_the_training(moments, message):
    with pytest.raises(ValueError, match=message):
        when(**moments)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (
            {"start": 1.0, "freeze_observers": 1.0, "freeze_batch_norm": 1.0},
            r"start=1\.0 is step 100.*ends at step 100",
        ),
        ({"start": "120 steps", "freeze_observers": "130 steps"}, "start='120 steps' is step 120"),
        ({"start": "9 epochs"}, r"freeze_observers=0\.8 \(step 80\) comes before start='9 epochs' \(step 90\)"),
        ({"freeze_observers": "101 steps"}, "freeze_observers='101 steps' is step 101, and training ends at step 100"),
        ({"freeze_batch_norm": "11 epochs"}, "freeze_batch_norm='11 epochs' is step 110"),
    ],
)
def test_what_does_not_fit_a_training(moments, message):
    with pytest.raises(ConfigError, match=message):
        when(**moments).resolve(HUNDRED)


def test_shares_of_an_endless_training_are_refused():
    with pytest.raises(ConfigError, match=r"start=0\.5 needs to know how long training is"):
        when().resolve(Length(total_steps=None, steps_per_epoch=None))
