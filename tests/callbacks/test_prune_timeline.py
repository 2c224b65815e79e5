"""Moments as users write them, and the steps that come of them."""

import pytest

from lightning_opt.callbacks.moments import Length, Moment
from lightning_opt.callbacks.prune_timeline import Timeline
from lightning_opt.errors import ConfigError

LENGTH = Length(total_steps=200, steps_per_epoch=20)
UNKNOWN = Length(total_steps=None, steps_per_epoch=None)


@pytest.mark.parametrize(
    ("value", "step"),
    [(0.0, 0), (0.25, 50), (1, 200), ("120 steps", 120), ("1 step", 1), ("3 epochs", 60), ("0.5 epochs", 10)],
)
def test_moments(value, step):
    assert Moment.read("start", value).to_steps(LENGTH) == step


@pytest.mark.parametrize("value", [-0.1, 1.5, 7, "soon", "3", "-2 steps", True, None, [0.1], float("nan")])
def test_what_is_no_moment_is_refused_by_name(value):
    with pytest.raises(ValueError, match="start="):
        Moment.read("start", value)


@pytest.mark.parametrize(("value", "needs"), [(0.5, "max_epochs"), ("2 epochs", "length")])
def test_a_share_of_an_endless_training_is_refused(value, needs):
    with pytest.raises(ConfigError, match=rf"end={value!r}.*{needs}"):
        Moment.read("end", value).to_steps(UNKNOWN)
    assert Moment.read("end", "5 steps").to_steps(UNKNOWN) == 5


def resolve(length=LENGTH, *, start=0.1, end=0.5, every=0.1, shrink=None):
    moments = {"start": start, "end": end, "every": every}
    read = {name: Moment.read(name, value) for name, value in moments.items()}
    return Timeline.resolve(length, **read, shrink=None if shrink is None else Moment.read("shrink_at", shrink))


def test_updates_come_at_the_start_every_so_often_and_at_the_end():
    timeline = resolve(start="3 steps", end="14 steps", every="4 steps")
    assert [step for step in range(-1, 30) if timeline.is_due(step - 1, step)] == [3, 7, 11, 14]
    # a batch may hold several optimizer steps
    assert [step for step in range(1, 30, 2) if timeline.is_due(step - 2, step)] == [3, 7, 11, 15]
    for step in range(14):
        upcoming = next(s for s in (3, 7, 11, 14) if s > step)
        assert timeline.steps_to_next(step) == upcoming - step
    assert timeline.steps_to_next(14) is None


def test_progress_is_the_share_of_the_time_between_start_and_end():
    timeline = resolve(start="10 steps", end="30 steps")
    assert [timeline.progress(step) for step in (0, 10, 15, 20, 30, 99)] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    at_once = resolve(start="10 steps", end="10 steps")
    assert [at_once.progress(step) for step in (9, 10, 11)] == [0.0, 1.0, 1.0]
    assert [step for step in range(20) if at_once.is_due(step - 1, step)] == [10]


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"start": "90 steps", "end": 0.1}, r"end=0\.1 \(step 20\) comes before start='90 steps'"),
        ({"end": "201 steps"}, r"end='201 steps' is step 201, and training ends at step 200"),
        ({"end": "11 epochs"}, r"end='11 epochs' is step 220"),
        ({"shrink": 0.3}, r"shrink_at=0\.3 \(step 60\) comes before end=0\.5"),
        ({"shrink": "300 steps"}, r"shrink_at='300 steps' is step 300"),
    ],
)
def test_moments_that_do_not_fit_are_refused_by_name(moments, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**moments)


def test_the_end_of_training_is_not_too_late():
    timeline = resolve(end=1.0, shrink=1.0)
    assert (timeline.end, timeline.shrink, timeline.last) == (200, 200, 200)
