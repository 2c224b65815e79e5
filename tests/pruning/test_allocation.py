"""How tensors share the sparsity, against the papers' formulas worked out in numpy."""

import numpy as np
import pytest
import torch

from lightning_opt.pruning.allocation import ERK, LAMP, GlobalAllocation, PerLayer, Uniform, lamp_scores
from lightning_opt.pruning.patterns import Block, Rows
from lightning_opt.pruning.selection import select

SHAPES = {"stem": (16, 3, 3, 3), "body": (64, 16, 3, 3), "wide": (128, 64), "head": (10, 128)}


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = {"stem": 4.0, "body": 1.0, "wide": 0.2, "head": 1.0}
    return {name: torch.randn(shape, generator=generator).abs() * scale[name] for name, shape in SHAPES.items()}


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_erk_equals_the_published_formula(sparsity):
    """Densities of Evci et al. (2020): eps * (n_in + n_out + kh + kw) / (n_in * n_out * kh * kw), at most 1."""
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in SHAPES.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    low, high = 0.0, 1e6  # eps by bisection instead of by the usual loop
    for _ in range(200):
        eps = (low + high) / 2
        low, high = (eps, high) if sum(min(1, eps * raw[n]) * sizes[n] for n in raw) < budget else (low, eps)
    shapes = {name: torch.Size(shape) for name, shape in SHAPES.items()}
    found = ERK().densities(shapes, sparsity)
    for name in SHAPES:
        assert found[name] == pytest.approx(min(1, eps * raw[name]), rel=1e-9)
    kept = counts(select(scores(), allocation=ERK(), sparsity=sparsity))
    assert kept == {name: round(found[name] * sizes[name]) for name in sizes}
    assert sum(kept.values()) == pytest.approx(budget, abs=len(sizes) / 2)


def test_erk_of_a_schedule_reaches_exactly_the_fraction():
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    before = None
    for fraction in (0.0, 0.2, 0.5, 0.9, 1.0):
        kept = counts(select(scores(), allocation=ERK(), sparsity=0.9, fraction=fraction))
        assert sum(kept.values()) == pytest.approx((1 - 0.9 * fraction) * total, abs=2)
        assert before is None or all(kept[name] <= before[name] for name in kept)
        before = kept


def np_lamp(weight):
    """Equation 3 of Lee et al. (2021): w[u]^2 / sum over v >= u of w[v]^2, weights sorted from small to large."""
    flat = weight.numpy().astype(np.float64).ravel()
    order = np.argsort(flat, kind="stable")
    squares = flat[order] ** 2
    result = np.empty_like(flat)
    for place, index in enumerate(order):
        result[index] = squares[place] / squares[place:].sum()
    return result


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_lamp_equals_the_published_formula(sparsity):
    given = scores()
    ranked = {name: np_lamp(score) for name, score in given.items() if name != "wide"}
    some = {name: given[name] for name in ranked}
    for name, score in some.items():
        np.testing.assert_allclose(lamp_scores(score.flatten()).numpy(), np.sort(ranked[name])[::-1], rtol=1e-5)
    everything = np.concatenate(list(ranked.values()))
    threshold = np.sort(everything)[::-1][round((1 - sparsity) * len(everything)) - 1]
    masks = select(some, allocation=LAMP(), sparsity=sparsity)
    assert counts(masks) == {name: int((values >= threshold).sum()) for name, values in ranked.items()}
    for name, mask in masks.items():  # within a tensor the largest scores stay
        assert some[name][mask].min() >= some[name][~mask].max()


def test_lamp_keeps_something_of_every_tensor_where_the_global_ranking_would_not():
    given = scores()
    given["wide"] = given["wide"] * 1e-6
    assert counts(select(given, allocation=GlobalAllocation(min_density=0.0), sparsity=0.9))["wide"] <= 1
    assert counts(select(given, allocation=LAMP(), sparsity=0.9))["wide"] > 100


def test_uniform_gives_every_tensor_the_same():
    masks = select(scores(), allocation=Uniform(), sparsity=0.9)
    for name, mask in masks.items():
        assert int(mask.sum()) == round(0.1 * mask.numel()), name
        assert scores()[name][mask].min() >= scores()[name][~mask].max()
    blocks = select({"wide": scores()["wide"]}, pattern=Block(4, 4), allocation=Uniform(), sparsity=0.75)
    assert int(blocks["wide"].sum()) == 16 * round(0.25 * 32 * 16)


def test_per_layer_by_pattern_the_first_match_counts_and_the_rest_has_the_overall_sparsity():
    allocation = PerLayer({"st?m": 0.0, "*e*": 0.25})  # stem, head
    masks = select(scores(), allocation=allocation, sparsity=0.9)
    density = {name: float(mask.float().mean()) for name, mask in masks.items()}
    assert density["stem"] == 1.0
    assert density["head"] == 0.75
    assert density["body"] == pytest.approx(0.1, abs=1e-3)
    half = select(scores(), allocation=allocation, sparsity=0.9, fraction=0.5)
    assert float(half["head"].float().mean()) == pytest.approx(0.875, abs=1e-3)


def test_per_layer_names_what_matches_nothing_and_what_is_near():
    with pytest.raises(ValueError, match=r"sparsities\['bodi'\] matches no pruned tensor; near names: body"):
        select(scores(), allocation=PerLayer({"bodi": 0.5}), sparsity=0.9)
    with pytest.raises(ValueError, match=r"sparsities\['body'\] must be in \[0, 1\), not 1.0"):
        PerLayer({"body": 1.0})


@pytest.mark.parametrize("allocation", [GlobalAllocation, Uniform, ERK, LAMP, PerLayer])
def test_no_tensor_is_emptied(allocation):
    given = scores() | {"tiny": torch.rand(2, 2) * 1e-9}
    total = sum(score.numel() for score in given.values())
    kept = counts(select(given, allocation=allocation(), sparsity=0.95))
    assert kept["tiny"] >= 1
    guarded = select(given, allocation=allocation(min_density=0.03), sparsity=0.95)
    for name, count in counts(guarded).items():
        assert count >= np.ceil(0.03 * given[name].numel()), name
    if allocation is GlobalAllocation:  # others give up what the guard adds
        assert sum(counts(guarded).values()) == round(0.05 * total)
        for name, mask in guarded.items():
            assert given[name][mask].min() >= given[name][~mask].max()


def test_a_guard_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match=r"min_density 0\.2 keeps"):
        select(scores(), allocation=GlobalAllocation(min_density=0.2), sparsity=0.9)
    with pytest.raises(ValueError, match="min_density must be in"):
        GlobalAllocation(min_density=1.0)


def test_rows_of_a_tensor_with_small_scores_are_guarded_too():
    given = scores()
    given["head"] = given["head"] * 1e-6
    masks = select(given, pattern=Rows(), allocation=GlobalAllocation(min_density=0.1), sparsity=0.5)
    assert int(masks["head"].all(1).sum()) == 1
