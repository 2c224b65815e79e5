"""Drop and grow, against the algorithms written as sets."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_opt.pruning.patterns import NM, Block, Element
from lightning_opt.pruning.regrow import SET, RigL


def case(seed=0, shape=(12, 16), density=0.3):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    return mask, torch.randn(shape, generator=generator) * mask, torch.randn(shape, generator=generator)


def rigl_by_hand(mask, weight, gradient, share):
    """Algorithm 1 of Evci et al. (2020), with sets of indices."""
    active = set(np.flatnonzero(mask).tolist())
    count = int(share * len(active))
    drop = set(sorted(active, key=lambda i: (abs(weight[i]), -i))[:count])
    candidates = set(range(len(mask))) - (active - drop)
    grow = set(sorted(candidates, key=lambda i: (-abs(gradient[i]), i))[:count])
    result = np.zeros_like(mask)
    result[list((active - drop) | grow)] = True
    return result


@given(st.integers(0, 10_000), st.floats(0.05, 0.45), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_rigl_equals_algorithm_1(seed, density, progress):
    mask, weight, gradient = case(seed, density=density)
    rule = RigL(fraction=0.4)
    share = 0.4 / 2 * (1 + math.cos(math.pi * progress))
    assert rule.fraction_at(progress) == pytest.approx(share)
    new = rule.swap({"w": mask}, {"w": weight}, {"w": gradient}, progress=progress)["w"]
    expected = rigl_by_hand(*(t.numpy().ravel() for t in (mask, weight, gradient)), rule.fraction_at(progress))
    np.testing.assert_array_equal(new.numpy().ravel(), expected)


def test_the_share_falls_along_a_cosine_to_nothing():
    values = [RigL(fraction=0.3).fraction_at(p) for p in (0, 0.5, 1)]
    assert values == pytest.approx([0.3, 0.15, 0.0])
    mask, weight, gradient = case()
    assert torch.equal(RigL().swap({"w": mask}, {"w": weight}, {"w": gradient}, progress=1.0)["w"], mask)


@pytest.mark.parametrize("rule", [RigL(), SET()], ids=["rigl", "set"])
@pytest.mark.parametrize("pattern", [Element(), Block(1, 4)], ids=str)
def test_every_tensor_keeps_its_density(rule, pattern):
    masks, weights, gradients = {}, {}, {}
    for number, (name, density) in enumerate({"a": 0.1, "b": 0.6, "full": 1.1, "empty": -1.0}.items()):
        _, weights[name], gradients[name] = case(number, density=2.0)
        units = torch.rand(12, 16 // 4, generator=torch.Generator().manual_seed(number)) < density
        masks[name] = units.repeat_interleave(4, dim=1)
        weights[name] = weights[name] * masks[name]
    new = rule.swap(masks, weights, gradients, progress=0.0, pattern=pattern)
    for name, mask in masks.items():
        assert int(new[name].sum()) == int(mask.sum()), name
    assert not torch.equal(new["a"], masks["a"])
    assert not torch.equal(new["b"], masks["b"])
    assert bool(new["full"].all())
    assert not bool(new["empty"].any())


def test_set_drops_the_smallest_and_grows_by_chance_which_the_seed_decides():
    mask, weight, _ = case()
    rule = SET(fraction=0.25)
    one, again, other = (rule.swap({"w": mask}, {"w": weight}, progress=0.7, seed=seed)["w"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    count = int(mask.sum())
    moved = int(0.25 * count)
    strongest = np.argsort(-(weight.abs() * mask).numpy().ravel(), kind="stable")[: count - moved]
    assert bool(one.flatten()[torch.from_numpy(strongest)].all())
    grown = [rule.swap({"w": mask}, {"w": weight}, progress=0.0, seed=seed)["w"] for seed in range(300)]
    often = torch.stack(grown).float().mean(0)[~mask]
    expected = moved / (mask.numel() - count + moved)
    assert float(often.mean()) == pytest.approx(expected, rel=0.1)
    assert float(often.std()) < 3 * math.sqrt(expected * (1 - expected) / 300)


def test_what_cannot_be_regrown_is_refused():
    mask, weight, gradient = case()
    with pytest.raises(ValueError, match="can't be regrown"):
        RigL().swap({"w": mask}, {"w": weight}, {"w": gradient}, progress=0.0, pattern=NM(2, 4))
    with pytest.raises(ValueError, match="RigL needs the gradient of w"):
        RigL().swap({"w": mask}, {"w": weight}, progress=0.0)
    with pytest.raises(ValueError, match="fraction must be in"):
        SET(fraction=1.0)
    assert RigL().needs == {"gradient"}
    assert SET().needs == frozenset()
