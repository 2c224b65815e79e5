"""Means over the positions that count."""

import pytest
import torch

from lightning_opt.losses.reduce import blank, masked_mean, masked_sum, mean_per_sample


def test_means_and_sums_leave_masked_values_out():
    values = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])
    mask = torch.tensor([[True, True], [False, True]])
    assert masked_sum(values, mask).item() == 7.0
    assert masked_mean(values, mask).item() == pytest.approx(7.0 / 3)
    assert mean_per_sample(values, mask).tolist() == [1.5, 4.0]


def test_nothing_left_is_zero_with_a_gradient_path():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    for result in (masked_mean(values, torch.zeros(2, dtype=torch.bool)), masked_mean(values[:0])):
        assert result.item() == 0.0
        result.backward()
    assert values.grad.tolist() == [0.0, 0.0]


def test_blank_puts_zeros_over_the_last_axis():
    blanked = blank(torch.full((2, 3), float("nan")), torch.tensor([False, True]))
    assert blanked[0].tolist() == [0.0, 0.0, 0.0]
    assert blanked[1].isnan().all()
