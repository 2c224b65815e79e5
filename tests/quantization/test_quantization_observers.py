"""Ranges against numpy, scipy and exhaustive searches over the values themselves."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_opt.quantization import histogram
from lightning_opt.quantization.functional import fake_quantize, scale_and_zero_point
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import (
    MSE,
    Entropy,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    observer_from_dict,
)

ACTIVATION = Grid(symmetric=False, signed=False, narrow=False)
ALL = [MinMax(), MovingAverage(), Percentile(q=0.99), MSE(), Entropy()]


def values(seed=0, shape=(4, 6, 50), spread=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def seen(observer, batches, grid=ACTIVATION):
    state = observer.start(grid, grid.channels(batches[0]))
    for batch in batches:
        state.update(batch)
    return state


@pytest.mark.parametrize("observer", ALL, ids=lambda o: o.name)
def test_plain_values_and_back(observer):
    assert observer_from_dict(observer.to_dict()) == observer
    assert observer_from_dict(observer.name) == type(observer)()


def test_unknown_observers_are_named():
    with pytest.raises(ValueError, match="'median' is not known; known are entropy"):
        observer_from_dict("median")
    with pytest.raises(ValueError, match=r"percentile.*share"):
        observer_from_dict({"name": "percentile", "share": 1})
    with pytest.raises(ValueError, match=r"0\.4"):
        Percentile(q=0.4)


def test_an_observer_from_outside_is_found_by_name():
    class Half(MinMax):
        name = "half_of_min_max"

    assert isinstance(observer_from_dict("half_of_min_max"), Half)
    assert issubclass(Half, Observer)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_min_max_is_that_of_numpy(axis):
    batches = [values(seed) for seed in range(3)]
    low, high = seen(MinMax(), batches, Grid(axis=axis)).range()
    both = np.stack([batch.numpy() for batch in batches])
    others = tuple(place for place in range(4) if axis is None or place != axis + 1)
    assert np.array_equal(low.numpy().squeeze(), both.min(others))
    assert np.array_equal(high.numpy().squeeze(), both.max(others))


def test_the_range_of_groups():
    x, grid = values(shape=(3, 10)), Grid(axis=0, group_size=5)
    low, high = MinMax().of(x, grid)
    assert torch.equal(low, x.reshape(6, 5).amin(1))
    assert torch.equal(high, x.reshape(6, 5).amax(1))


def test_the_moving_average_is_that_of_the_formula():
    batches = [values(seed) for seed in range(4)]
    low, high = seen(MovingAverage(momentum=0.3), batches).range()
    wanted_low = wanted_high = None
    for batch in batches:
        least, most = float(batch.min()), float(batch.max())
        wanted_low = least if wanted_low is None else 0.7 * wanted_low + 0.3 * least
        wanted_high = most if wanted_high is None else 0.7 * wanted_high + 0.3 * most
    assert float(low) == pytest.approx(wanted_low, rel=1e-6)
    assert float(high) == pytest.approx(wanted_high, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([1e-5, 0.01, 1.0, 300.0, 1e5]))
def test_a_value_is_in_the_bin_between_its_edges(seed, spread):
    x = values(seed, (1, 200), spread)
    counts = torch.zeros(1, histogram.BINS, dtype=torch.int64)
    histogram.add(counts, x)
    edges = histogram.edges().numpy()
    wanted, _ = np.histogram(x.double().numpy(), bins=np.concatenate([[-np.inf], edges[1:-1], [np.inf]]))
    found = counts[0].numpy()
    assert found.sum() == wanted.sum() == 200
    # A negative value on an edge belongs to the bin further out here; such values are rare in random data.
    assert np.abs(found - wanted).sum() <= 2


def test_bins_are_narrow():
    edges = histogram.edges()
    middle = histogram.HALF
    assert edges[middle] == 0
    assert (edges[1:] > edges[:-1]).all()
    wide = (edges[middle + 2 :] - edges[middle + 1 : -1]) / edges[middle + 1 : -1]
    assert wide.max() <= 1 / 128


@pytest.mark.parametrize("q", [0.9, 0.99, 0.999])
def test_percentiles_are_those_of_numpy(q):
    batches = [values(seed, (64, 500)) for seed in range(3)]
    low, high = seen(Percentile(q=q), batches).range()
    everything = torch.stack(batches).numpy()
    wanted = np.quantile(everything, [(1 - q) / 2, (1 + q) / 2])
    assert [float(low), float(high)] == pytest.approx(wanted, rel=0.01)


def test_a_percentile_of_one_is_the_range():
    batches = [values(seed) for seed in range(3)]
    low, high = seen(Percentile(q=1.0), batches).range()
    everything = torch.stack(batches)
    assert float(low) == pytest.approx(float(everything.min()), rel=0.01)
    assert float(high) == pytest.approx(float(everything.max()), rel=0.01)


def squared_error(x, low, high, grid):
    return float((fake_quantize(x, *scale_and_zero_point(low, high, grid), grid) - x).double().square().mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_least_squared_error_is_found(bits):
    observer, grid = MSE(), Grid(bits=bits)
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((20000,)) if bits == 8 else values(shape=(20000,))
    low, high = seen(observer, [x], grid).range()
    reach = float(x.abs().max())
    errors = [
        squared_error(x, torch.tensor([-t * reach]), torch.tensor([t * reach]), grid) for t in np.linspace(0.01, 1, 100)
    ]
    found = squared_error(x, low, high, grid)
    assert found <= min(errors) * 1.03
    assert found < squared_error(x, *MinMax().of(x, grid), grid) * (0.9 if bits < 8 else 0.99)


def test_the_least_squared_error_of_a_weight_is_exact():
    grid, x = Grid(bits=3, axis=0), values(shape=(5, 60))
    low, high = MSE(steps=50).of(x, grid)
    for row in range(5):
        reach = (x[row].min(), x[row].max())
        errors = [
            squared_error(x[row], (reach[0] * t).reshape(1), (reach[1] * t).reshape(1), Grid(bits=3))
            for t in np.linspace(0.02, 1, 50).astype(np.float32)
        ]
        found = squared_error(x[row], low[row : row + 1], high[row : row + 1], Grid(bits=3))
        assert found == pytest.approx(min(errors), rel=1e-5)


def entropy_by_hand(x, bins, levels):
    """Migacz (2017): the threshold, from the values themselves and scipy's divergence."""
    from scipy.stats import entropy

    counts, edges = np.histogram(np.abs(x), bins=bins, range=(0, np.abs(x).max()))
    best = None
    for cut in range(levels, bins + 1):
        p = counts[:cut].astype(float)
        p[-1] += counts[cut:].sum()
        level, filled = np.arange(cut) * levels // cut, counts[:cut] > 0
        merged = np.bincount(level, counts[:cut], levels) / np.maximum(np.bincount(level, filled, levels), 1)
        q = merged[level] * filled
        q = np.maximum(q / q.sum(), 1e-6 / cut)
        divergence = entropy(p / p.sum(), q)
        if best is None or divergence < best[0]:
            best = divergence, edges[cut]
    return best[1]


def test_the_least_divergence_is_that_of_the_formula():
    torch.manual_seed(0)
    x = torch.distributions.StudentT(4.0).sample((100_000,)).clamp(-30, 30)
    low, high = seen(Entropy(bins=512), [x], Grid()).range()
    wanted = entropy_by_hand(x.numpy(), 512, 127)
    assert float(high) == pytest.approx(wanted, rel=0.15)
    assert float(-low) == pytest.approx(wanted, rel=0.15)
    assert float(high) < 0.9 * float(x.abs().max())


@pytest.mark.parametrize("observer", ALL, ids=lambda o: o.name)
def test_ranks_are_merged_by_the_reductions(observer):
    batches = [values(seed) for seed in range(4)]
    whole = seen(observer, batches)
    ranks = [seen(observer, batches[:2]), seen(observer, batches[2:])]
    pairs = [state.reductions() for state in ranks]
    for (ours, how), (theirs, same) in zip(*pairs, strict=True):
        assert how == same
        merged = {"min": torch.minimum, "max": torch.maximum, "sum": torch.add, "mean": lambda a, b: (a + b) / 2}[how]
        ours.copy_(merged(ours, theirs))
    if observer.name == "moving_average":
        apart = [seen(observer, part).range() for part in (batches[:2], batches[2:])]
        assert torch.equal(ranks[0].range()[0], (apart[0][0] + apart[1][0]) / 2)
    else:
        assert all(torch.equal(*pair) for pair in zip(ranks[0].range(), whole.range(), strict=True))


@pytest.mark.parametrize("observer", ALL, ids=lambda o: o.name)
@pytest.mark.parametrize("grid", [ACTIVATION, Grid(axis=1, bits=4)], ids=["tensor", "channel"])
def test_states_are_deterministic_and_survive(observer, grid):
    batches = [values(seed) for seed in range(4)]
    state = seen(observer, batches[:2], grid)
    for other in (
        copy.deepcopy(state),
        pickle.loads(pickle.dumps(state)),
        observer.start(grid, grid.channels(batches[0])),
    ):
        other.load_state_dict(state.state_dict())
        for batch in batches[2:]:
            other.update(batch)
        whole = seen(observer, batches, grid)
        assert all(torch.equal(*pair) for pair in zip(other.range(), whole.range(), strict=True))


@pytest.mark.parametrize("observer", ALL, ids=lambda o: o.name)
def test_bounded_memory_and_bfloat16(observer):
    state = seen(observer, [values(seed).bfloat16() for seed in range(3)])
    before = sum(buffer.numel() for buffer in state.buffers())
    for seed in range(3, 9):
        state.update(values(seed, (8, 300), spread=100.0).bfloat16())
    assert sum(buffer.numel() for buffer in state.buffers()) == before < 20_000
    low, high = state.range()
    assert low.dtype == high.dtype == torch.float32
    assert torch.isfinite(low).all()
    assert torch.isfinite(high).all()
    assert low < 0 < high


@pytest.mark.parametrize("observer", ALL, ids=lambda o: o.name)
def test_zeros_and_one_sign(observer):
    low, high = seen(observer, [torch.zeros(4, 5)]).range()
    assert (float(low), float(high)) == (0.0, 0.0)
    low, high = seen(observer, [values().abs() + 1]).range()
    assert scale_and_zero_point(low, high, ACTIVATION)[1].tolist() == [0]
    assert float(high) > 1


@pytest.mark.parametrize("observer", ALL, ids=lambda o: o.name)
def test_updating_never_waits_for_the_device(observer):
    """No value is read on the way: an update can be traced with tensors that have none."""
    state = observer.start(ACTIVATION, 1).to("meta")
    state.update(torch.empty(4, 5, device="meta"))
