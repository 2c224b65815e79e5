"""Which weights stay: against a stable numpy sort of everything."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_opt.pruning import ranking
from lightning_opt.pruning.allocation import GlobalAllocation, Uniform
from lightning_opt.pruning.patterns import NM, Block, Columns, Element, Rows
from lightning_opt.pruning.schedules import Cubic
from lightning_opt.pruning.selection import select

FREE = GlobalAllocation(min_density=0.0)
FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -1e-45, 3.4028234663852886e38]),
)


def by_sorting(tensors, count):
    """Mark the largest `count` of all, of equal ones the first."""
    everything = np.concatenate([tensor.numpy().ravel() for tensor in tensors]) + 0.0
    mask = np.zeros(len(everything), dtype=bool)
    mask[np.argsort(-everything.astype(np.float64), kind="stable")[:count]] = True
    return np.split(mask, np.cumsum([tensor.numel() for tensor in tensors])[:-1])


@given(
    st.lists(st.lists(FLOATS, min_size=1, max_size=40), min_size=1, max_size=5),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_best_equals_a_stable_sort_whatever_the_floats(lists, share, sampled, by_torch):
    tensors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    count = round(share * sum(len(values) for values in lists))
    names = ("_SAMPLED_FROM", "_SAMPLE", "_CHUNK", "_MARGIN", "_FEW", "_on_cpu")
    before = {name: getattr(ranking, name) for name in names}
    if sampled:  # the way that large inputs go, with samples that are often wrong
        ranking._SAMPLED_FROM, ranking._SAMPLE, ranking._CHUNK, ranking._MARGIN, ranking._FEW = 4, 8, 16, 0.2, 4
    if by_torch:  # the way of other devices
        ranking._on_cpu = lambda tensor: False
    try:
        masks = ranking.best(tensors, count)
    finally:
        for name, value in before.items():
            setattr(ranking, name, value)
    for mask, expected in zip(masks, by_sorting(tensors, count), strict=True):
        np.testing.assert_array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("kind", ["normal", "few values", "mostly zero", "signed"])
def test_best_equals_a_stable_sort_of_a_million(kind):
    rng = np.random.default_rng(0)
    values = rng.normal(size=1_000_003).astype(np.float32)
    values = {
        "normal": np.abs(values),
        "few values": np.abs(values).round(1),
        "mostly zero": np.abs(values) * (rng.random(len(values)) < 0.1),
        "signed": values,
    }[kind].astype(np.float32)
    tensors = list(torch.from_numpy(values).split([700_000, 1, 300_002]))
    for share in (0.0001, 0.1, 0.5, 0.99):
        count = round(share * len(values))
        for mask, expected in zip(ranking.best(tensors, count), by_sorting(tensors, count), strict=True):
            np.testing.assert_array_equal(mask.numpy(), expected)


@given(st.lists(FLOATS, min_size=1, max_size=60), st.data(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_kth_largest_equals_the_sorted_value(values, data, few):
    count, before = data.draw(st.integers(1, len(values))), ranking._FEW
    ranking._FEW = before if few else 0
    try:
        found = ranking.kth_largest([torch.tensor(values, dtype=torch.float32)], count)
    finally:
        ranking._FEW = before
    assert found == sorted(np.float32(values), reverse=True)[count - 1]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan_scores_are_refused_with_the_name(large, nan):
    scores = {"fine": torch.rand(8, 8), "broken": torch.rand(600, 600) if large else torch.rand(4, 4)}
    scores["broken"][1, 2] = nan
    for options in ({}, {"pattern": NM(2, 4)}, {"pattern": Rows()}, {"allocation": Uniform()}):
        with pytest.raises(ValueError, match="broken hold NaN"):
            select(scores, sparsity=0.5, **options)


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (16, 8, 3, 3), "linear": (24, 16), "stem": (16, 4)}
    return {name: torch.randn(shape, generator=generator).abs() for name, shape in shapes.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.987])
@pytest.mark.parametrize("fraction", [0.0, 0.37, 1.0])
def test_global_selection_is_exact_and_equals_the_sort(sparsity, fraction):
    given = scores()
    total = sum(score.numel() for score in given.values())
    masks = select(given, allocation=FREE, sparsity=sparsity, fraction=fraction)
    count = round((1 - sparsity * fraction) * total)
    assert sum(int(mask.sum()) for mask in masks.values()) == count
    for mask, expected in zip(masks.values(), by_sorting(list(given.values()), count), strict=True):
        np.testing.assert_array_equal(mask.numpy().ravel(), expected)


@pytest.mark.parametrize("pattern", [Block(1, 4), Block(8, 1), Block(2, 2)], ids=str)
def test_global_selection_of_blocks_keeps_whole_blocks_with_the_largest_sums(pattern):
    given = scores()
    masks = select(given, pattern=pattern, allocation=FREE, sparsity=0.75)
    pooled = [pattern.pool(score) for score in given.values()]
    expected = by_sorting(pooled, round(0.25 * sum(len(units) for units in pooled)))
    for (name, mask), kept in zip(masks.items(), expected, strict=True):
        sums = pattern.pool(mask.float()).numpy() / pattern.unit_size(given[name].shape)
        np.testing.assert_array_equal(sums, kept)


def test_rows_of_different_size_come_as_near_as_they_can_in_order_of_their_scores():
    given = scores()
    masks = select(given, pattern=Rows(), allocation=FREE, sparsity=0.6)
    sizes, sums, kept = [], [], []
    for name, score in given.items():
        sizes += [score[0].numel()] * len(score)
        sums += score.flatten(1).sum(1).tolist()
        rows = masks[name].flatten(1)
        assert bool((rows.all(1) == rows.any(1)).all())
        kept += rows.all(1).tolist()
    order = np.argsort(-np.array(sums), kind="stable")
    target = round(0.4 * sum(score.numel() for score in given.values()))
    off = [abs(total - target) for total in np.cumsum(np.array(sizes)[order])]
    assert min(off) < max(sizes)
    expected = set(order[: int(np.argmin(off)) + 1].tolist()) | {
        int(np.argmax(np.array(sums[a:b]))) + a for a, b in ((0, 16), (16, 40), (40, 56))
    }
    assert {place for place, keep in enumerate(kept) if keep} == expected


def test_ties_are_broken_by_order_in_the_mapping_and_in_the_tensor():
    masks = select({"b": torch.ones(3), "a": torch.ones(3)}, allocation=FREE, sparsity=1 / 3)
    assert masks["b"].tolist() == [True, True, True]
    assert masks["a"].tolist() == [True, False, False]
    one = select({"w": torch.ones(2, 3)}, allocation=FREE, sparsity=0.5)["w"]
    assert one.tolist() == [[True, True, True], [False, False, False]]


def test_memory_layout_changes_nothing():
    given = scores()
    other = {name: score.clone() for name, score in given.items()}
    other["conv"] = other["conv"].round(decimals=1).to(memory_format=torch.channels_last)
    given["conv"] = given["conv"].round(decimals=1)
    assert not other["conv"].is_contiguous()
    for pattern in (Element(), NM(2, 4), Block(1, 4), Rows(), Columns()):
        one, two = (select(values, pattern=pattern, sparsity=0.5) for values in (given, other))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_repeated_pruning_never_compounds_and_magnitude_keeps_zeros_out():
    weights = {name: score * score.new_tensor(-1.0) for name, score in scores().items()}
    total = sum(weight.numel() for weight in weights.values())
    before = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for step in range(21):
        fraction = Cubic().at(step / 20)
        for _ in range(3):  # again and again at one step: no step further
            masks = select({name: w.abs() for name, w in weights.items()}, sparsity=0.9, fraction=fraction)
            weights = {name: w * masks[name] for name, w in weights.items()}
            assert sum(int(mask.sum()) for mask in masks.values()) == round((1 - 0.9 * fraction) * total)
            assert all(not bool((masks[name] & ~before[name]).any()) for name in masks)
            before = masks
    assert sum(int(mask.sum()) for mask in before.values()) == round(0.1 * total)


def test_within_forbids_what_a_criterion_would_bring_back_and_protect_keeps_what_it_would_drop():
    given, masks = scores(), select(scores(), sparsity=0.5)
    turned = {name: 1 / (score + 0.01) for name, score in given.items()}  # now the small ones are the best
    free = select(turned, sparsity=0.6)
    assert any(bool((free[name] & ~masks[name]).any()) for name in free)
    shrunk = select(turned, sparsity=0.6, within=masks)
    assert all(not bool((shrunk[name] & ~masks[name]).any()) for name in shrunk)
    total = sum(score.numel() for score in given.values())
    assert sum(int(mask.sum()) for mask in shrunk.values()) == round(0.4 * total)
    lowest = {"stem": given["stem"] < given["stem"].median()}
    guarded = select(given, sparsity=0.9, protect=lowest)
    assert bool(guarded["stem"][lowest["stem"]].all())
    assert sum(int(mask.sum()) for mask in guarded.values()) == round(0.1 * total)


def test_within_and_protect_go_before_the_count():
    given, few = scores(), select(scores(), sparsity=0.9)
    masks = select({name: 1 / score for name, score in given.items()}, sparsity=0.2, within=few)
    assert all(torch.equal(masks[name], few[name]) for name in few)  # no more than these are there
    most = {name: ~mask for name, mask in few.items()}
    masks = select(given, sparsity=0.95, protect=most)
    assert all(bool(masks[name][most[name]].all()) for name in most)


def test_nm_within_masks_only_shrinks_and_is_full_at_the_start():
    given = scores()
    assert all(bool(mask.all()) for mask in select(given, pattern=NM(2, 4), fraction=0.0).values())
    masks = select(given, pattern=NM(2, 4), sparsity=0.9)
    assert all(float(mask.float().mean()) == 0.5 for mask in masks.values())
    again = select({n: s.flip(0) for n, s in given.items()}, pattern=NM(2, 4), within=masks)
    assert all(not bool((again[name] & ~masks[name]).any()) for name in again)


def test_weights_with_inputs_first_are_turned():
    score = torch.rand(12, 8)  # (inputs, outputs)
    for pattern in (NM(2, 4), Block(1, 4), Rows(), Columns(), Element()):
        plain = select({"w": score.t().contiguous()}, pattern=pattern, sparsity=0.5)["w"]
        mask = select({"w": score}, pattern=pattern, sparsity=0.5, inputs_first={"w"})["w"]
        if pattern == Element():
            assert int(mask.sum()) == int(plain.sum())
        else:
            assert torch.equal(mask, plain.t())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"sparsity": 90}, "0.9 for nine of ten"),
        ({"fraction": 1.5}, "fraction must be in"),
        ({"pattern": NM(2, 5)}, "weights of conv"),
    ],
)
def test_arguments_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        select(scores(), **options)
