"""Criteria of single weights against their published formulas, worked in float64 numpy."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_opt.pruning.criteria import Evidence, Magnitude, Movement, Random, Snip, SoftMovement, Taylor, Wanda
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.selection import select
from lightning_opt.pruning.statistics import Statistics

W = torch.tensor([[-3.0, 0.5, 0.0], [1.0, -2.0, 0.25]])
G = torch.tensor([[0.1, -4.0, 9.0], [-2.0, 0.5, 0.0]])


def close(found, wanted, tol=1e-6):
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    np.testing.assert_allclose(found.numpy(), wanted, rtol=tol, atol=tol)


def rank(values):
    return np.argsort(np.argsort(np.asarray(values).ravel()))


def test_magnitude():
    w = W.double().numpy()
    close(Magnitude().score(W, Evidence(name="w")), np.abs(w))
    close(Magnitude(p=2).score(W, Evidence(name="w")), w**2)
    with pytest.raises(ValueError, match="p must be 1 or 2, not 3"):
        Magnitude(p=3)


def test_snip_and_taylor_formulas():
    w, g = W.double().numpy(), G.double().numpy()
    evidence = Evidence(name="w", gradient=G, squared_gradient=G**2)
    close(Snip().score(W, evidence), np.abs(g * w))
    close(Taylor().score(W, evidence), (g * w) ** 2)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def batches(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 5, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(count)]


def observed(model, needs, data, names=("a.weight", "b.weight")):
    statistics = Statistics(model, names, needs)
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        statistics.after_backward()
    return statistics


@pytest.mark.parametrize(("criterion", "power"), [(Snip(), 1), (Taylor(), 2)])
def test_gradient_scores_against_finite_differences(criterion, power):
    """Scale a weight by (1 + h) and (1 - h): the slope of the loss is g * w, whatever autograd says."""
    torch.manual_seed(0)
    model, data, h = Tiny(), batches(3), 1e-4
    found = criterion.score(model.a.weight, observed(model, criterion.needs, data).evidence("a.weight"))
    exact = Tiny().double()
    exact.load_state_dict(model.state_dict())

    def loss(x, y):
        with torch.no_grad():
            return F.cross_entropy(exact(x.double()), y).item()

    slopes = np.zeros((len(data), *W.new_empty(4, 5).shape))
    for i, j in np.ndindex(4, 5):
        before = exact.a.weight[i, j].item()
        ends = []
        for factor in (1 + h, 1 - h):
            exact.a.weight.data[i, j] = before * factor
            ends.append([loss(x, y) for x, y in data])
        exact.a.weight.data[i, j] = before
        slopes[:, i, j] = (np.array(ends[0]) - np.array(ends[1])) / (2 * h)
    wanted = np.abs(slopes.mean(0)) if power == 1 else (slopes**2).mean(0)
    close(found, wanted, tol=1e-5)
    wrong = np.abs(slopes).mean(0) if power == 1 else slopes.mean(0) ** 2  # the other order of mean and power
    assert not np.allclose(found.numpy(), wrong, rtol=1e-3)


def test_wanda_against_numpy_and_the_papers_point():
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 10.0, 0.1])
    norm = np.linalg.norm(x.double().numpy(), axis=0)
    wanted = np.abs(W.double().numpy()) * norm
    evidence = Evidence(name="w", input_norm=torch.from_numpy(norm).float())
    close(Wanda().score(W, evidence), wanted, tol=1e-5)
    assert (rank(wanted) != rank(np.abs(W.numpy()))).any()  # it is not magnitude
    turned = Evidence(name="w", input_norm=evidence.input_norm, input_dim=0)
    close(Wanda().score(W.T.contiguous(), turned), wanted.T, tol=1e-5)


def test_wanda_spreads_grouped_convolutions():
    w = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    norm = torch.rand(2 * 2 * 9, generator=torch.Generator().manual_seed(3))
    wanted = np.zeros(w.shape)
    for o, i, a, b in np.ndindex(*w.shape):
        channel = (o // 2) * 2 + i
        wanted[o, i, a, b] = abs(w[o, i, a, b].item()) * norm[channel * 9 + a * 3 + b].item()
    close(Wanda().score(w, Evidence(name="w", input_norm=norm, groups=2)), wanted)
    with pytest.raises(ValueError, match=r"input_norm of w has 36 entries.*shape \(4, 2, 3, 3\)"):
        Wanda().score(w, Evidence(name="w", input_norm=norm, groups=1))


def test_movement_is_minus_the_sum_of_gradient_times_weight():
    """Sanh's own derivation: S is what SGD at rate 1 makes of scores behind a straight-through mask."""
    torch.manual_seed(0)
    model, data = Tiny(), batches(5)
    scores = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    reference = Tiny().double()
    reference.load_state_dict(model.state_dict())
    statistics = Statistics(model, ["a.weight"], Movement.needs)
    for x, y in data:
        weight = reference.a.weight
        straight = torch.ones_like(scores).detach() + scores - scores.detach()  # all kept, gradient to the scores
        out = reference.b(torch.tanh(F.linear(x.double(), weight * straight, reference.a.bias)))
        gradients = torch.autograd.grad(F.cross_entropy(out, y), [scores, weight])
        scores = (scores - gradients[0]).detach().requires_grad_()
        weight.data -= 0.1 * gradients[1]
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        statistics.after_backward()
        model.a.weight.data -= 0.1 * model.a.weight.grad
    found = Movement().score(model.a.weight, statistics.evidence("a.weight"))
    close(found, scores.detach().numpy(), tol=1e-5)
    assert (rank(found) != rank(model.a.weight.detach().abs())).any()


def test_movement_goes_on_behind_a_mask_that_zeroes_weights():
    """The gradient at a masked place times the value before masking, as in the paper, so that it can come back."""
    torch.manual_seed(0)
    model, data = Tiny(), batches(6)
    mask = torch.ones(4, 5)
    mask[0] = 0.0
    dense = model.a.weight.detach().clone()
    statistics = Statistics(model, ["a.weight"], {"movement"})
    wanted = np.zeros((4, 5))
    for step, (x, y) in enumerate(data):
        if step == 2:
            model.a.weight.data *= mask
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        statistics.after_backward()
        wanted -= (model.a.weight.grad.double() * dense.double()).numpy()
    found = Movement().score(model.a.weight, statistics.evidence("a.weight"))
    close(found, wanted, tol=1e-5)
    assert torch.equal(statistics.last_value("a.weight"), dense)
    frozen = Statistics(model, ["a.weight"], {"movement"})  # sees the zeros only: no value, no movement there
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        frozen.after_backward()
    assert (frozen.evidence("a.weight").movement[0] == 0).all()


def test_masked_weights_come_back_as_in_the_paper():
    """Top half by score, chosen anew each step: the same masks as Sanh's straight-through simulation in float64."""
    torch.manual_seed(0)
    model, data = Tiny(), batches(25)
    reference = Tiny().double()
    reference.load_state_dict(model.state_dict())
    statistics = Statistics(model, ["a.weight"], {"movement"})
    masks, weight = Masks({"a.weight": model.a.weight}), model.a.weight
    behind = reference.a.weight.detach().clone()  # the paper's weights, which masks hide and do not zero
    score, kept, came_back = torch.zeros(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.bool), 0
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        statistics.after_backward()
        masks.mask_gradients()
        weight.data -= 0.2 * weight.grad
        found = select({"a.weight": Movement().score(weight, statistics.evidence("a.weight"))}, sparsity=0.5)
        again = found["a.weight"] & ~masks["a.weight"]
        weight.data[again] = statistics.last_value("a.weight")[again]
        masks.update(found)
        masks.apply()

        shown = (behind * kept).requires_grad_()
        out = reference.b(torch.tanh(F.linear(x.double(), shown, reference.a.bias)))
        gradient = torch.autograd.grad(F.cross_entropy(out, y), shown)[0]
        score -= gradient * behind
        order = score.flatten().argsort(descending=True)[:10]
        new = torch.zeros(20, dtype=torch.bool).scatter_(0, order, True).view(4, 5)
        behind = torch.where(new & kept, behind - 0.2 * gradient, behind)  # zeroed: as it was at the last backward
        came_back += (new & ~kept).sum().item()
        kept = new
        assert torch.equal(masks["a.weight"], kept)
        torch.testing.assert_close(weight.detach().double(), behind * kept, rtol=1e-4, atol=1e-6)
    assert came_back > 3


def test_soft_movement_learns_how_many_to_keep():
    """The regularizer's pull on each score, step by step in float64, and the mask that follows from the strength."""
    torch.manual_seed(0)
    data, kept = batches(30), {}
    for strength in (0.0, 0.01, 0.3):
        torch.manual_seed(0)
        model, criterion = Tiny(), SoftMovement(threshold=0.5, strength=strength, scale=2.0)
        statistics, score = Statistics.of(model, ["a.weight"], criterion), np.zeros((4, 5))
        for x, y in data:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            statistics.after_backward()
            score -= (model.a.weight.grad.double() * model.a.weight.detach().double()).numpy()
            sigmoid = 1 / (1 + np.exp(-2.0 * score))
            score -= strength * 2.0 * sigmoid * (1 - sigmoid)
        evidence = statistics.evidence("a.weight")
        close(evidence.movement, score, tol=1e-4)
        kept[strength] = criterion.kept(model.a.weight, evidence).sum().item()
        assert kept[strength] == (score > 0).sum()
        wanted = strength * (1 / (1 + np.exp(-2.0 * score))).sum()
        assert criterion.penalty([evidence.movement]).item() == pytest.approx(wanted, rel=1e-4)
    assert kept[0.0] > kept[0.3] == 0


def test_soft_movement_ranks_without_saturating():
    evidence = Evidence(name="w", movement=torch.tensor([50.0, 60.0, 70.0]))
    score = SoftMovement().score(torch.ones(3), evidence)
    assert score[0] < score[1] < score[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, "threshold must be between 0 and 1, not 1.0"),
        ({"strength": -1.0}, "strength must be at least 0, not -1.0"),
        ({"scale": 0.0}, "scale must be more than 0, not 0.0"),
    ],
)
def test_soft_movement_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SoftMovement(**arguments)


def test_random_is_the_same_in_another_process_and_differs_by_name_and_seed():
    code = (
        "import torch; torch.manual_seed(7); from lightning_opt.pruning.criteria import *;"
        "print(Random().score(torch.zeros(3, 4), Evidence(name='layer.weight', seed=5)).flatten().tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = Random().score(torch.ones(3, 4), Evidence(name="layer.weight", seed=5))
    assert str(here.flatten().tolist()) == other.strip()
    for different in (Evidence(name="layer.weight", seed=6), Evidence(name="other.weight", seed=5)):
        assert not torch.equal(here, Random().score(torch.ones(3, 4), different))
    many = Random().score(torch.zeros(100, 100), Evidence(name="w"))
    assert abs(many.mean().item() - 0.5) < 0.02
    assert many.unique().numel() > 9900


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Random().score(torch.zeros(4), Evidence(name="w"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("criterion", [Snip(), Taylor(), Movement(), SoftMovement(), Wanda()])
def test_missing_evidence_is_named(criterion):
    (need,) = criterion.needs
    with pytest.raises(ValueError, match=f"there is no {need} of blocks.0.weight"):
        criterion.score(W, Evidence(name="blocks.0.weight"))


@pytest.mark.parametrize("criterion", [Magnitude(), Magnitude(p=2), Snip(), Taylor(), Movement(), Wanda(), Random()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_finite_float32_of_the_weights_shape(criterion, dtype):
    bad = torch.tensor([[float("nan"), float("inf"), 1e30]])
    weight = torch.tensor([[1e30, -2.0, 3e30]], dtype=dtype, requires_grad=True)
    evidence = Evidence(
        name="w",
        gradient=bad,
        squared_gradient=bad,
        movement=bad,
        input_norm=torch.tensor([1e30, float("nan"), 1.0]),
    )
    score = criterion.score(weight, evidence)
    assert score.dtype == torch.float32
    assert score.shape == weight.shape
    assert score.isfinite().all()
    assert not score.requires_grad
