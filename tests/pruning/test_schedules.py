"""How sparsity grows, against the published formulas; and the way back to early weights."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.rewind import Rewind
from lightning_opt.pruning.schedules import Cubic, Exponential, Iterative, Linear, OneShot
from lightning_opt.pruning.selection import select

POINTS = [step / 40 for step in range(41)]


def test_cubic_equals_equation_1_of_zhu_and_gupta():
    s_final, s_initial, begin, steps, every = 0.9, 0.18, 100, 50, 8
    schedule = Cubic(initial=s_initial / s_final)
    for now in range(begin, begin + steps * every + 1, every):
        published = s_final + (s_initial - s_final) * (1 - (now - begin) / (steps * every)) ** 3
        assert s_final * schedule.at((now - begin) / (steps * every)) == pytest.approx(published, abs=1e-12)


def test_linear_and_one_shot():
    assert [Linear().at(p) for p in (0, 0.25, 1)] == [0, 0.25, 1]
    assert Linear(initial=0.5).at(0.5) == 0.75
    assert [OneShot().at(p) for p in (0, 0.5, 1)] == [1, 1, 1]


def test_exponential_removes_the_same_share_of_what_is_left():
    final = 0.95
    schedule = Exponential(rate=-math.log(1 - final))
    for progress in POINTS:
        assert 1 - final * schedule.at(progress) == pytest.approx((1 - final) ** progress, rel=1e-9)


def test_iterative_removes_a_share_of_the_rest_at_the_end_of_each_round():
    """Frankle and Carbin (2019): 20 % of what is left in each round."""
    final, schedule = 1 - 0.8**10, Iterative(rounds=10, share=0.2)
    for done in range(11):
        density = 1 - final * schedule.at(done / 10)
        assert density == pytest.approx(0.8**done, rel=1e-9)
        assert schedule.at(min(done / 10 + 0.099, 1.0)) == schedule.at(done / 10)  # nothing within a round
    assert schedule.rewind_points == tuple(done / 10 for done in range(1, 11))
    assert all(schedule.at(p) > schedule.at(p - 1e-3) for p in schedule.rewind_points)
    assert Iterative(rounds=10, rewind=False).rewind_points == () == Cubic().rewind_points


@pytest.mark.parametrize("schedule", [OneShot(), Linear(), Cubic(), Exponential(), Iterative(), Cubic(initial=0.3)])
def test_schedules_rise_to_one_and_stay(schedule):
    values = [schedule.at(progress) for progress in POINTS]
    assert values == sorted(values)
    assert values[-1] == 1.0 == schedule.at(1.7)
    assert schedule.at(-1.0) == values[0] >= 0.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Cubic(initial=1.2), "initial must be in"),
        (lambda: Linear(initial=-0.1), "initial must be in"),
        (lambda: Exponential(rate=0.0), "rate must be more than 0"),
        (lambda: Iterative(rounds=0), "rounds must be at least 1"),
        (lambda: Iterative(rounds=4, rewind_to=0.25), "rewind_to must be in"),
        (lambda: Iterative(share=1.0), "share must be in"),
    ],
)
def test_impossible_schedules_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def train(model, optimizer, masks=None, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(32, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if masks is not None:
            masks.apply()


def test_a_rewound_ticket_trains_as_its_early_weights_would_with_the_same_masks():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, steps=3)  # late rewinding: back to step 3
    early, rewind = copy.deepcopy(model), Rewind()
    rewind.save(model)
    prunable = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    masks = Masks(prunable)
    for sparsity in (0.3, 0.6, 0.8):  # more than one round: the saved values must not have been trained on
        train(model, optimizer, masks)
        new = select({name: p.detach().abs() for name, p in prunable.items()}, sparsity=sparsity)
        masks.update(new)
        rewind.restore(model, [optimizer])
        masks.apply()
        expected = copy.deepcopy(early)
        with torch.no_grad():
            for name, p in expected.named_parameters():
                p.mul_(new.get(name, torch.ones(())))
        for (name, tensor), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
            assert torch.equal(tensor, other), name
        assert not optimizer.state  # moments and step counts are those of a new optimizer
        fresh = torch.optim.AdamW(expected.parameters(), lr=0.05)
        again = Masks({name: p for name, p in expected.named_parameters() if p.dim() == 2})
        again.update(new)
        train(expected, fresh, again)
        train(model, optimizer, masks)
        for (name, tensor), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
            assert torch.equal(tensor, other), name


def test_rewind_survives_a_checkpoint_and_leaves_other_models_optimizers_alone():
    model, other = net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1, momentum=0.9)
    first, rewind = copy.deepcopy(model.state_dict()), Rewind()
    rewind.save(model)
    other(torch.ones(1, 2)).sum().backward()
    train(model, optimizer)
    again = Rewind()
    again.load_state_dict(copy.deepcopy(rewind.state_dict()))
    again.restore(model, [optimizer])
    assert all(torch.equal(tensor, first[name]) for name, tensor in model.state_dict().items())
    assert set(optimizer.state) == set(other.parameters())


def test_rewind_to_another_model_is_refused():
    rewind = Rewind()
    with pytest.raises(ValueError, match="can't be rewound"):
        rewind.restore(net())
    rewind.save(net())
    other = net()
    other[0].weight.data = other[0].weight.data[:8]
    with pytest.raises(ValueError, match=r"0\.weight is not what it was"):
        rewind.restore(other)
