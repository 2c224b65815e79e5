"""Losses on predicted numbers against their formulas, worked in float64 numpy."""

import numpy as np
import pytest
import torch

from lightning_opt.losses import BoundedRegressionKD, RegressionKD, Signals, Supervision
from lightning_opt.testing import check_loss

B = 6


def np_bounded(s, t, y, margin):
    ours, theirs = ((s - y) ** 2).sum(axis=-1), ((t - y) ** 2).sum(axis=-1)
    return np.where(ours + margin > theirs, ours, 0.0)


def arrays(shape, scale=2.0):
    rng = np.random.default_rng(0)
    return scale * rng.normal(size=shape), scale * rng.normal(size=shape)


def says(array, dtype=torch.float64):
    return Signals(logits=torch.tensor(array, dtype=dtype))


def supervision(labels, mask=None):
    return Supervision(labels=torch.tensor(labels), mask=None if mask is None else torch.tensor(mask))


class TestRegression:
    def test_bounded_formula_on_both_sides_of_the_bound(self):
        s, t = arrays((40, 2), scale=1.0)
        y = np.zeros((40, 2))
        for margin in (0.0, 0.5):
            value = BoundedRegressionKD(margin=margin)(says(s), says(t), supervision(y)).item()
            expected = np_bounded(s, t, y, margin)
            assert 0 < (expected > 0).sum() < 40
            assert value == pytest.approx(expected.mean(), abs=1e-9)

    def test_bounded_leaves_a_better_student_alone(self):
        labels = torch.zeros(3)
        student = torch.tensor([[0.1], [2.0], [0.5]], requires_grad=True)
        BoundedRegressionKD()(
            Signals(logits=student), Signals(logits=torch.ones(3)), Supervision(labels=labels)
        ).backward()
        assert student.grad.flatten().tolist() == pytest.approx([0.0, 4.0 / 3, 0.0])

    @pytest.mark.parametrize("shape", [(B,), (B, 1)])
    def test_one_number_may_come_as_a_column(self, shape):
        s, t = arrays((B, 1))
        value = RegressionKD()(says(s.reshape(shape)), says(t[:, 0]), Supervision()).item()
        assert value == pytest.approx(((s - t) ** 2).mean(), abs=1e-9)
        bounded = BoundedRegressionKD()(says(s.reshape(shape)), says(t[:, 0]), supervision(np.zeros(B))).item()
        assert bounded == pytest.approx(np_bounded(s, t, np.zeros((B, 1)), 0.0).mean(), abs=1e-9)

    def test_behaves(self):
        s, t = arrays((B, 2))
        mask = np.array([True, False, True, True, False, True])
        check_loss(
            BoundedRegressionKD(),
            says(s, torch.float32),
            says(t, torch.float32),
            supervision(np.zeros((B, 2)), mask),
            zero_when_equal=True,
        )
