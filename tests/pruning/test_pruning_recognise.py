"""The arrangement of zeros is read from masks that were drawn by hand or by numpy, not by the package."""

import numpy as np
import pytest
import torch

from lightning_opt.pruning.recognise import is_n_of_m, kind_of_zeros


def dense(*shape, seed=0):
    values = np.random.default_rng(seed).uniform(0.5, 1.5, size=shape)
    return torch.tensor(values, dtype=torch.float32)


def n_of_m(rows, columns, n, m, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows * columns // m, m))
    for row in mask:
        row[rng.choice(m, size=n, replace=False)] = 1
    return torch.tensor(mask.reshape(rows, columns), dtype=torch.float32)


def blocks(rows, columns, high, wide, share, seed=0):
    kept = np.random.default_rng(seed).random((rows // high, columns // wide)) >= share
    return torch.tensor(np.kron(kept, np.ones((high, wide))), dtype=torch.float32)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("shape", [(64, 48), (32, 16, 3, 3), (10, 128)])
def test_single_zeros_are_unstructured_whatever_their_share(shape, share):
    keep = torch.tensor(np.random.default_rng(3).random(shape) >= share, dtype=torch.float32)
    assert kind_of_zeros(dense(*shape) * keep) == "unstructured"


def test_zeros_in_equal_number_per_row_are_no_n_of_m():
    mask = n_of_m(64, 32, 16, 32)  # half of each row of 32, as row-wise criteria leave it
    assert kind_of_zeros(dense(64, 32) * mask) == "unstructured"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 16), (2, 6)])
def test_n_of_m_is_named_by_the_strictest_that_holds(n, m):
    assert kind_of_zeros(dense(32, 96) * n_of_m(32, 96, n, m)) == f"{n}:{m}"


def test_n_of_m_of_a_convolution_runs_along_its_inputs():
    planes = torch.stack([n_of_m(16, 32, 2, 4, seed=place) for place in range(9)], dim=-1)
    assert kind_of_zeros(dense(16, 32, 3, 3) * planes.reshape(16, 32, 3, 3)) == "2:4"


def test_n_of_m_of_a_transposed_weight_is_found():
    assert kind_of_zeros((dense(32, 64) * n_of_m(32, 64, 2, 4)).T) == "2:4"


@pytest.mark.parametrize(("high", "wide"), [(1, 4), (16, 1), (32, 1), (4, 4), (2, 8)])
def test_blocks_are_named_by_their_size(high, wide):
    assert kind_of_zeros(dense(64, 64) * blocks(64, 64, high, wide, 0.6)) == f"blocks {high}x{wide}"


def test_whole_rows_and_columns():
    weight = dense(32, 24, 3, 3)
    weight[[1, 5, 9]] = 0
    assert kind_of_zeros(weight) == "rows and columns"
    weight[:, 4] = 0
    assert kind_of_zeros(weight) == "rows and columns"
    assert kind_of_zeros(torch.zeros(8, 8)) == "rows and columns"


def test_few_zeros_are_none():
    weight = dense(100, 64)
    weight[0, :32] = 0  # 0.5 %, such as the padding row of a table
    assert kind_of_zeros(weight) == "none"
    assert kind_of_zeros(torch.zeros(7)) == "none"


def test_which_kinds_are_n_of_m():
    assert [is_n_of_m(kind) for kind in ("2:4", "10:32", "blocks 1x4", "unstructured", ":")] == [
        True,
        True,
        False,
        False,
        False,
    ]
