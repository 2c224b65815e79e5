"""Scores of structures against loops over the units of a small traced network, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_opt.pruning.criteria import (
    Activation,
    BatchNormScale,
    FirstOrder,
    GroupNorm,
    Magnitude,
    Random,
    Taylor,
    Wanda,
    score_groups,
    sparsity_penalty,
)
from lightning_opt.pruning.criteria.slimming import add_sparsity_gradient, batch_norm_scales
from lightning_opt.pruning.statistics import Statistics
from lightning_opt.pruning.structure import trace


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.conv2(torch.relu(self.norm(self.conv1(x))))
        return self.down(torch.tanh(self.up(x.mean(dim=(2, 3)))))


PARTS = {  # what goes with a channel of conv1, and with a hidden unit
    "conv1": [("conv1.weight", 0), ("conv1.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("conv2.weight", 1)],
    "up": [("up.weight", 0), ("up.bias", 0), ("down.weight", 1)],
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0]))
        net.norm.bias.copy_(torch.randn(5))
    return net


@pytest.fixture(scope="module")
def structure(model):
    found = trace(model, example())
    wanted = [group for group in found.groups if any(group.name.endswith(name) for name in PARTS)]
    assert len(wanted) == 2
    return SimpleNamespace(groups=wanted, unit_slices=found.unit_slices)


def example():
    return torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def short(scores):
    return {name.rpartition(".")[2].split(" ")[0]: score for name, score in scores.items()}


def sums(model, values):
    """Add `values[name]` over each unit's slices, entry by entry."""
    found = {}
    for group, parts in PARTS.items():
        units = dict(model.named_parameters())[parts[0][0]].shape[0]
        found[group] = np.array([sum(np.take(values[n], u, axis=d).sum() for n, d in parts) for u in range(units)])
    return found


def observe(model, structure, needs):
    names = sorted({m.tensor for group in structure.groups for m in structure.unit_slices(group) if m.is_parameter})
    statistics = Statistics(model, names, needs)
    with statistics.calibrating():
        model.zero_grad()
        F.cross_entropy(model(example()), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    statistics.after_backward()
    return statistics


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("normalize", [None, "mean"])
def test_group_norm_sums_over_all_that_goes_with_the_unit(model, structure, power, reduce, normalize):
    criterion = GroupNorm(Magnitude(p=power), reduce=reduce, normalize=normalize)
    found = short(score_groups(structure, model, criterion))
    values = {name: p.detach().double().abs().numpy() ** power for name, p in model.named_parameters()}
    ones = sums(model, {name: np.ones_like(v) for name, v in values.items()})
    assert set(found) == set(PARTS)
    for group, wanted in sums(model, values).items():
        wanted = wanted / ones[group] if reduce == "mean" else wanted
        wanted = wanted / wanted.mean() if normalize else wanted
        np.testing.assert_allclose(found[group].numpy(), wanted, rtol=1e-5)
        assert found[group].dtype == torch.float32


def test_a_criterion_of_weights_is_summed_and_made_comparable(model, structure):
    a = score_groups(structure, model, Magnitude(p=2))
    b = score_groups(structure, model, GroupNorm(Magnitude(p=2), normalize="mean"))
    for name in a:
        assert torch.equal(a[name], b[name])
        assert a[name].mean().item() == pytest.approx(1.0)


def gradients(model):
    exact = Net().double().eval()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return exact, torch.tensor([0, 1, 2, 0, 1, 2])


def test_taylor_sums_squares_and_first_order_squares_the_sum(model, structure):
    """First order is the slope of the loss when a whole unit is scaled: by finite differences, without autograd."""
    exact, labels = gradients(model)
    parameters = dict(exact.named_parameters())

    def loss():
        with torch.no_grad():
            return F.cross_entropy(exact(example().double()), labels).item()

    slopes, h = {}, 1e-5
    for group, parts in PARTS.items():
        slopes[group] = []
        for unit in range(parameters[parts[0][0]].shape[0]):
            ends = []
            for factor in (1 + h, 1 - h):
                for name, dim in parts:
                    parameters[name].data.select(dim, unit).mul_(factor)
                ends.append(loss())
                for name, dim in parts:
                    parameters[name].data.select(dim, unit).div_(factor)
            slopes[group].append((ends[0] - ends[1]) / (2 * h))
    statistics = observe(model, structure, {"gradient", "squared_gradient"})
    found = short(score_groups(structure, model, FirstOrder(), statistics))
    for group, slope in slopes.items():
        np.testing.assert_allclose(found[group].numpy(), np.array(slope) ** 2, rtol=1e-3, atol=1e-9)
    F.cross_entropy(exact(example().double()), labels).backward()
    squares = {name: ((p.grad * p.detach()) ** 2).numpy() for name, p in exact.named_parameters()}
    taylor = short(score_groups(structure, model, GroupNorm(Taylor(), normalize=None), statistics))
    for group, wanted in sums(model, squares).items():
        np.testing.assert_allclose(taylor[group].numpy(), wanted, rtol=1e-3)
        assert not np.allclose(taylor[group].numpy(), found[group].numpy(), rtol=0.1)


def tapped(model, name, *, inputs):
    seen = []
    hook = (lambda m, args, out: seen.append(args[0])) if inputs else (lambda m, args, out: seen.append(out))
    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        model(example())
    handle.remove()
    return seen[0].double()


def test_activation_as_read_and_as_written(model, structure):
    statistics = observe(model, structure, {"input_norm", "output_norm"})
    read = short(score_groups(structure, model, Activation(normalize=None), statistics))
    hidden = tapped(model, "down", inputs=True)
    np.testing.assert_allclose(read["up"].numpy(), hidden.norm(dim=0).numpy(), rtol=1e-5)
    windows = F.unfold(tapped(model, "conv2", inputs=True), 3)  # each value counts as often as a window reads it
    wanted = windows.square().sum(dim=(0, 2)).view(5, 9).sum(1).sqrt()
    np.testing.assert_allclose(read["conv1"].numpy(), wanted.numpy(), rtol=1e-5)
    written = short(score_groups(structure, model, Activation(side="output", normalize=None), statistics))
    np.testing.assert_allclose(written["up"].numpy(), tapped(model, "up", inputs=False).norm(dim=0).numpy(), rtol=1e-5)
    assert not np.allclose(written["up"].numpy(), read["up"].numpy(), rtol=0.01)
    conv, norm = (tapped(model, name, inputs=False).square().sum(dim=(0, 2, 3)) for name in ("conv1", "norm"))
    assert written["conv1"].shape == (5,)
    np.testing.assert_allclose(written["conv1"].numpy(), conv.sqrt().numpy(), rtol=1e-5)
    assert not torch.allclose(conv, norm)


def test_wanda_of_a_structure_counts_what_the_unit_is_multiplied_with(model, structure):
    statistics = observe(model, structure, {"input_norm"})
    found = short(score_groups(structure, model, GroupNorm(Wanda(), normalize=None), statistics))
    x, hidden = tapped(model, "up", inputs=True).norm(dim=0), tapped(model, "down", inputs=True).norm(dim=0)
    up, down = model.up.weight.detach().double().abs(), model.down.weight.detach().double().abs()
    wanted = (up * x).sum(1) + (down * hidden).sum(0)  # biases meet no inputs
    np.testing.assert_allclose(found["up"].numpy(), wanted.numpy(), rtol=1e-5)


def test_batch_norm_scale(model, structure):
    only = SimpleNamespace(
        groups=[g for g in structure.groups if g.name.endswith("conv1")], unit_slices=structure.unit_slices
    )
    (found,) = score_groups(only, model, BatchNormScale()).values()
    assert found.tolist() == [0.5, 2.0, 0.0, 1.0, 3.0]
    with pytest.raises(ValueError, match=r"group up.* cannot be scored: it needs the scale of a batch norm.*up.weight"):
        score_groups(structure, model, BatchNormScale())


def test_the_penalty_and_its_gradient():
    """Liu's equation 1: lambda times the sum of |gamma|; the gradient is lambda times the sign, 0 at 0."""
    torch.manual_seed(0)
    net, other = Net().train(), Net().train()
    other.load_state_dict(net.state_dict())
    gamma = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0])
    for each in (net, other):
        each.norm.weight.data.copy_(gamma)
    assert sparsity_penalty(net, strength=0.01).item() == pytest.approx(0.01 * 6.5)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    F.cross_entropy(net(example()), labels).backward()
    plain = net.norm.weight.grad.clone()
    (F.cross_entropy(other(example()), labels) + sparsity_penalty(other, strength=0.01)).backward()
    add_sparsity_gradient(batch_norm_scales(net), strength=0.01)
    wanted = plain.double().numpy() + 0.01 * np.sign(gamma.numpy())
    np.testing.assert_allclose(net.norm.weight.grad.numpy(), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(other.norm.weight.grad.numpy(), wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"include='layer\*' matches no batch norm"):
        sparsity_penalty(net, include="layer*")
    with pytest.raises(ValueError, match="strength must be at least 0, not -1"):
        sparsity_penalty(net, strength=-1.0)


def test_the_penalty_makes_scales_sparse():
    """Train the scales alone: with the penalty useless channels are switched off, without it none is."""
    found = {}
    for strength in (0.0, 0.3):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8, affine=True)
        x = torch.randn(256, 8)
        target = x[:, :3].sum(1) + torch.randn(256)  # five of the eight channels are of no use
        optimizer = torch.optim.SGD(norm.parameters(), lr=0.02)
        for _ in range(300):
            loss = (norm(x).sum(1) - target).square().mean() + sparsity_penalty(norm, strength=strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[strength] = norm.weight.detach().abs()
    near_zero = 0.02 * 0.3 * 1.1  # one step of the penalty
    assert (found[0.3][3:] < near_zero).all()
    assert (found[0.3][:3] > 0.5).all()
    assert (found[0.0][3:] > near_zero).sum() >= 4


def test_random_is_a_fair_control(model, structure):
    a, b = (score_groups(structure, model, Random(), seed=seed) for seed in (0, 1))
    again = score_groups(structure, model, Random(), seed=0)
    for name in a:
        assert torch.equal(a[name], again[name])
        assert not torch.equal(a[name], b[name])


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (FirstOrder(), "cannot be scored: it needs a parameter with a gradient"),
        (Activation(), "cannot be scored: it needs a layer whose inputs along the group were observed"),
        (Wanda(), "cannot be scored: it needs a tensor with input_norm"),
    ],
)
def test_what_was_not_observed_is_refused(model, structure, criterion, message):
    with pytest.raises(ValueError, match=message):
        score_groups(structure, model, criterion)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupNorm(reduce="max"), "reduce must be 'sum' or 'mean', not 'max'"),
        (lambda: GroupNorm(normalize="max"), "normalize must be 'mean' or None, not 'max'"),
        (lambda: Activation(side="both"), "side must be 'input' or 'output', not 'both'"),
    ],
)
def test_group_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_needs_follow_the_criterion():
    assert GroupNorm(Taylor()).needs == {"squared_gradient"}
    assert GroupNorm().needs == BatchNormScale().needs == frozenset()
    assert Activation(side="output").needs == {"output_norm"}
