"""Schedules at the points where their definition fixes them."""

import copy
import math

import pytest

from lightning_opt.losses import Constant, Cosine, Linear, Step, value_at
from lightning_opt.losses.schedules import check_value


def test_constant_and_plain_numbers_stay():
    assert [Constant(3.0)(p) for p in (0.0, 0.3, 1.0)] == [3.0, 3.0, 3.0]
    assert value_at(3, 0.7) == 3
    assert value_at(Constant(2.5), 0.7) == 2.5


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 4.0), (0.2, 4.0), (0.35, 3.25), (0.5, 2.5), (0.8, 1.0), (1.0, 1.0)]
)
def test_linear_between_its_two_points(progress, value):
    assert Linear(4.0, 1.0, begin=0.2, finish=0.8)(progress) == pytest.approx(value)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_cosine_is_half_a_period(progress):
    assert Cosine(0.0, 2.0)(progress) == pytest.approx(1.0 - math.cos(math.pi * progress))


def test_cosine_keeps_to_its_window():
    schedule = Cosine(1.0, 0.0, begin=0.5, finish=0.75)
    assert [schedule(p) for p in (0.0, 0.5, 0.625, 0.75, 1.0)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


def test_step_holds_the_new_value_from_the_jump_on():
    schedule = Step([1.0, 0.5, 0.0], [0.3, 0.6])
    assert [schedule(p) for p in (0.0, 0.29, 0.3, 0.59, 0.6, 1.0)] == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Linear(0.0, 1.0, begin=0.5, finish=0.5), "begin"),
        (lambda: Linear(0.0, 1.0, finish=1.5), "finish"),
        (lambda: Cosine(0.0, 1.0, begin=-0.1), "begin"),
        (lambda: Step([1.0], [0.5]), "values"),
        (lambda: Step([1.0, 2.0, 3.0], [0.6, 0.5]), "at must rise"),
    ],
)
def test_impossible_schedules(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_both_ends_of_a_schedule_are_checked():
    check_value("weight", Linear(0.0, 1.0), low=0.0)
    with pytest.raises(ValueError, match="weight must be at least 0, not -1"):
        check_value("weight", Linear(1.0, -1.0), low=0.0)
    with pytest.raises(ValueError, match="temperature must be more than 0, not 0"):
        check_value("temperature", 0.0, low=0.0, open_low=True)


def test_copies_are_equal():
    schedule = Cosine(1.0, 0.0, begin=0.1)
    assert copy.deepcopy(schedule) == schedule
