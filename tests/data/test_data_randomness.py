import numpy as np
import pytest
import torch
from scipy import stats

from lightning_opt.data.randomness import Draws, splitmix64


def reference(seed, count):
    """SplitMix64 in plain integers, as published."""
    state, outputs, mask = seed, [], (1 << 64) - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_splitmix64_gives_the_published_numbers():
    # Test vector of the reference implementation in C for seed 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert reference(1234567, 5) == published
    seeds = [0, 1, 1234567, 2**64 - 1]
    found = splitmix64(np.array(seeds, dtype=np.uint64), 7)
    assert found.tolist() == [reference(seed, 7) for seed in seeds]


def draws(indices, *, seed=3, variant=1):
    return Draws.of(seed=seed, variants=np.full(len(indices), variant), indices=np.asarray(indices))


def test_a_draw_depends_on_its_own_sample_only():
    whole = draws(np.arange(100)).uniform(5)
    torch.testing.assert_close(draws([17, 3]).uniform(5), whole[[17, 3]], rtol=0, atol=0)
    torch.testing.assert_close(draws([17, 3]).uniform(2), whole[[17, 3], :2], rtol=0, atol=0)


def test_seed_variant_index_and_stream_each_give_other_numbers():
    base = draws(np.arange(50))
    others = [
        draws(np.arange(50), seed=4),
        draws(np.arange(50), variant=2),
        draws(np.arange(1, 51)),
        base.fork(0),
        base.fork(1),
    ]
    tables = [one.uniform(4) for one in (base, *others)]
    for number, one in enumerate(tables):
        for other in tables[number + 1 :]:
            assert not (one == other).any(dim=1).any()


def test_swapping_variant_and_index_gives_other_numbers():
    a = Draws.of(seed=0, variants=[1], indices=[2]).uniform(4)
    b = Draws.of(seed=0, variants=[2], indices=[1]).uniform(4)
    assert not (a == b).any()


@pytest.mark.parametrize("axis", ["samples", "positions", "variants", "seeds"])
def test_numbers_are_uniform_and_normal_along_every_axis(axis):
    n = 20_000
    where = {
        "samples": lambda: draws(np.arange(n)),
        "positions": lambda: draws([5]),
        "variants": lambda: Draws.of(seed=1, variants=np.arange(n), indices=np.zeros(n)),
        "seeds": lambda: None,
    }[axis]()
    if axis == "seeds":
        uniform = torch.cat([draws([5], seed=seed).uniform() for seed in range(2000)])
        normal = torch.cat([draws([5], seed=seed).normal() for seed in range(2000)])
    else:
        count = n if axis == "positions" else 1
        uniform, normal = where.uniform(count), where.normal(count)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3


def test_neighbours_are_uncorrelated():
    table = draws(np.arange(20_000)).uniform(4).double().numpy()
    correlation = np.corrcoef(np.concatenate([table[:-1], table[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(8)).max() < 0.03
