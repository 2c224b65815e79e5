"""Patterns: which weights go together, against loops over single elements."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.pruning.patterns import NM, Block, Columns, Element, Rows, has_inputs_first, inputs_first

SHAPES = [(8, 12), (8, 12, 3, 3)]
UNITS = {  # pattern -> the unit of element (o, i, *k), as a label
    Element(): lambda at: at,
    Block(1, 4): lambda at: (at[0], at[1] // 4, *at[2:]),
    Block(4, 1): lambda at: (at[0] // 4, at[1], *at[2:]),
    Block(2, 3): lambda at: (at[0] // 2, at[1] // 3, *at[2:]),
    Rows(): lambda at: at[0],
    Columns(): lambda at: at[1],
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", UNITS, ids=str)
def test_pool_sums_the_scores_of_each_unit_and_expand_gives_them_back(pattern, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums, order = {}, []
    for at in np.ndindex(*shape):  # row-major: units are numbered by their first element
        label = UNITS[pattern](at)
        if label not in sums:
            order.append(label)
        sums[label] = sums.get(label, 0.0) + scores[at].item()
    units = pattern.pool(scores)
    torch.testing.assert_close(units, torch.tensor([sums[label] for label in order], dtype=torch.float64))
    assert scores.numel() == len(units) * pattern.unit_size(torch.Size(shape))
    kept = torch.arange(len(units)) % 3 == 0
    chosen = {label for label, keep in zip(order, kept.tolist(), strict=True) if keep}
    mask = pattern.expand(kept, torch.Size(shape))
    assert mask.shape == shape
    assert all(bool(mask[at]) == (UNITS[pattern](at) in chosen) for at in np.ndindex(*shape))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 3), (6, 8)])
@pytest.mark.parametrize("shape", [(4, 24), (4, 24, 2, 2)], ids=str)
def test_nm_keeps_the_best_n_of_each_group_along_the_inputs(n, m, shape):
    pattern, scores = NM(n, m), torch.rand(shape, generator=torch.Generator().manual_seed(1))
    mask = pattern.expand(pattern.keep(pattern.pool(scores), 1.0), torch.Size(shape)).numpy()
    by_input = np.moveaxis(scores.numpy(), 1, -1).reshape(-1, m)
    best = np.argsort(-by_input, axis=1, kind="stable")[:, :n]
    expected = np.zeros_like(by_input, dtype=bool)
    np.put_along_axis(expected, best, True, axis=1)
    np.testing.assert_array_equal(np.moveaxis(mask, 1, -1).reshape(-1, m), expected)


def test_nm_goes_through_every_step_from_dense_to_its_end_and_never_gives_a_weight_back():
    pattern, units = NM(2, 8), torch.rand(64, generator=torch.Generator().manual_seed(2))
    masks = [pattern.keep(units, step / 60) for step in range(61)]
    counts = [int(mask.reshape(-1, 8).sum(1).unique()) for mask in masks]
    assert sorted(set(counts), reverse=True) == [8, 7, 6, 5, 4, 3, 2]
    assert counts == sorted(counts, reverse=True)
    assert all(not bool((later & ~earlier).any()) for earlier, later in itertools.pairwise(masks))


def test_nm_of_equal_scores_keeps_the_first():
    assert NM(2, 4).keep(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 0.0]), 1.0).tolist() == [
        *(True, True, False, False),
        *(True, True, False, False),
    ]


@pytest.mark.parametrize(
    ("pattern", "shape", "said"),
    [
        (NM(2, 4), (8, 27), "N:M 2:4 needs the input dimension to be divisible by 4, it is 27"),
        (NM(2, 4), (32, 1, 3, 3), "divisible by 4, it is 1; exclude them"),
        (NM(2, 4), (8,), "at least two dimensions"),
        (Block(16, 1), (24, 8), "output dimension to be divisible by 16, it is 24"),
        (Block(1, 4), (24, 6), "input dimension to be divisible by 4, it is 6"),
        (Rows(), (8,), r"choose Element\(\)"),
        (Columns(), (8,), r"choose Element\(\)"),
        (Element(), (0, 3), "nothing to choose from"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused_with_its_name_and_shape(pattern, shape, said):
    with pytest.raises(ValueError, match=said) as refusal:
        pattern.check("layer1.conv.weight", torch.Size(shape))
    assert "layer1.conv.weight" in str(refusal.value)
    assert str(tuple(shape)) in str(refusal.value)


@pytest.mark.parametrize("make", [lambda: NM(4, 4), lambda: NM(0, 4), lambda: Block(0, 4), lambda: Block(1, 1)])
def test_impossible_patterns_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_modules_that_keep_their_inputs_first_are_found():
    class Conv1D(nn.Module):  # as Hugging Face has it: (inputs, outputs)
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 6, nn.Parameter(torch.zeros(4, 6))

    class Odd(nn.Linear):
        pass

    has_inputs_first.register(Odd, lambda module: True)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 6),
            "attn": Conv1D(),
            "up": nn.ConvTranspose2d(4, 6, 3),
            "conv": nn.Conv2d(4, 6, 3),
            "words": nn.Embedding(9, 4),
            "odd": Odd(4, 6),
        }
    )
    assert inputs_first(model) == {"attn.weight", "up.weight", "odd.weight"}
