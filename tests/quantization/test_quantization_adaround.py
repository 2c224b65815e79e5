"""AdaRound against all ways of rounding up or down, tried out, and against float64 arithmetic on the rows."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.quantization.adaround import AdaRound, Products, learn_rounding
from lightning_opt.quantization.gptq import GPTQ
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.rounding import Lattice
from lightning_opt.quantization.scheme import Scheme


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows=400, width=8, seed=0):
    mixed = draw(rows, width, seed=seed) @ draw(width, width, seed=seed + 1)
    return mixed * torch.linspace(0.2, 3.0, width) + 0.5


def lattice_for(weight, bits=3):
    qmax = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True) / qmax
    return Lattice(scale, torch.zeros_like(scale), -qmax, qmax, weight.shape[-1])


def output_error(new, old, rows, wanted_rows):
    """Return each output's squared error over the rows, in float64."""
    new, old = np.asarray(new, dtype=float), np.asarray(old, dtype=float)
    difference = rows.double().numpy() @ new.T - wanted_rows.double().numpy() @ old.T
    return (difference**2).sum(0)


def test_products_hold_the_error_of_any_weights():
    rows, wanted_rows = correlated(), correlated() + 0.1 * draw(400, 8, seed=5)
    old, new = draw(1, 6, 8, seed=2), draw(1, 6, 8, seed=3)
    parts = [Products.of(rows[None, i : i + 100], wanted_rows[None, i : i + 100]) for i in range(0, 400, 100)]
    products = parts[0] + parts[1] + parts[2] + parts[3]
    assert products.rows == 400
    error = output_error(new[0], old[0], rows, wanted_rows)
    np.testing.assert_allclose(products.error(new, old)[0].numpy(), error, rtol=1e-4)
    moved = old + 1e-3 * new  # half the gradient, by a difference quotient
    by_hand = (products.error(moved, old) - products.error(old - 1e-3 * new, old)) / 4e-3
    np.testing.assert_allclose((products.slope(old) * new).sum(-1).numpy(), by_hand.numpy(), rtol=1e-3)


@pytest.mark.parametrize("shifted", [False, True])
def test_close_to_the_best_of_all_roundings(shifted):
    rows = correlated()
    wanted_rows = rows + 0.3 * draw(400, 8, seed=5) if shifted else rows
    weight = draw(1, 12, 8, seed=2)
    lattice = lattice_for(weight)
    found = learn_rounding(weight, Products.of(rows[None], wanted_rows[None]), lattice)
    error = output_error(found[0], weight[0], rows, wanted_rows)
    nearest = output_error(lattice.nearest(weight)[0], weight[0], rows, wanted_rows)
    best = np.full(12, np.inf)
    scale = lattice.scale[0].numpy()
    below = np.floor(weight[0].numpy() / scale)
    for ups in itertools.product((0, 1), repeat=8):
        tried = np.clip(below + np.array(ups), -3, 3) * scale
        best = np.minimum(best, output_error(tried, weight[0], rows, wanted_rows))
    assert (error <= nearest * (1 + 1e-6)).all()
    assert (best <= error * (1 + 1e-5)).all()
    closed = (nearest.sum() - error.sum()) / (nearest.sum() - best.sum())
    assert closed > 0.75


def test_each_weight_is_one_of_the_two_levels_next_to_it_and_zeros_stay():
    rows, weight = correlated(width=16), draw(2, 6, 16, seed=2)
    weight[:, :, ::5] = 0.0
    lattice = lattice_for(weight)
    found = learn_rounding(weight, Products.of(rows.expand(2, -1, -1), rows.expand(2, -1, -1)), lattice)
    steps = (found / lattice.scale).double()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    assert ((found - weight).abs() <= lattice.scale * 1.0001).all()
    assert ((found - weight).abs() > 0.5001 * lattice.scale).any()
    assert (found[weight == 0] == 0).all()


def test_the_same_data_give_the_same_rounding():
    rows, weight = correlated(), draw(1, 6, 8, seed=2)
    first, second = (learn_rounding(weight, Products.of(rows[None], rows[None]), lattice_for(weight)) for _ in range(2))
    assert torch.equal(first, second)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.head = nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.norm(self.conv(x)))))
        return self.head(x.mean((2, 3)))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


PER_TENSOR = Scheme(weight=Grid(bits=4, symmetric=False, signed=False), activation=None)


def images(count=4):
    return [draw(8, 3, 10, 10, seed=i) for i in range(count)]


@pytest.mark.parametrize("scheme", ["w4a8", "w3", "w4g9", PER_TENSOR])
def test_a_model_answers_more_like_the_float_model_and_converts_bit_equal(scheme):
    model, x = net(), torch.cat(images())
    plain = quantize(model, x[:1], scheme, calibration=images())
    found = quantize(model, x[:1], scheme, calibration=images(), improve=[AdaRound(steps=60)], convert=False)
    converted = quantize(model, x[:1], scheme, calibration=images(), improve=[AdaRound(steps=60)])
    with torch.no_grad():
        assert torch.equal(found(x), converted(x))
        wanted = model(x)
        ours, theirs = (one(x) - wanted for one in (converted, plain))
    assert ours.norm() < 0.8 * theirs.norm()


def test_layers_imitate_the_float_model_from_what_rounded_layers_give():
    """The head's weights are what learning it alone gives: rounded inputs here, float inputs and weights there."""
    found = quantize(net(), images()[0], "w3a8", calibration=images(), improve=[AdaRound(steps=60)], convert=False)
    seen = []
    for model in (found, net()):
        rows = []
        model.head.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0]))
        with torch.no_grad():
            for x in images():
                model(x)
        seen.append(torch.cat(rows)[None])
    weight = net().head.weight.detach()[None]
    alone = learn_rounding(weight, Products.of(*seen), lattice_for(weight), steps=60)
    torch.testing.assert_close(found.head.weight.detach(), alone[0], rtol=1e-4, atol=1e-5)
    without = learn_rounding(weight, Products.of(seen[1], seen[1]), lattice_for(weight), steps=60)
    assert not torch.allclose(without, alone, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaRound(steps=0), "steps must be at least 1, not 0"),
        (lambda: AdaRound(learning_rate=0.0), "learning_rate must be more than 0, not 0.0"),
        (lambda: AdaRound(strength=-1.0), "strength must be more than 0, not -1.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_excluded_layers_stay_and_nothing_left_is_an_error():
    arguments = {"calibration": images(), "convert": False}
    for kind, values in ((AdaRound, {"steps": 5}), (GPTQ, {})):
        found = quantize(net(), images()[0], "w3", improve=[kind(exclude=["head"], **values)], **arguments)
        assert torch.equal(found.head.weight, net().head.weight)
        assert not torch.equal(found.conv.weight, net().conv.weight)
        with pytest.raises(ConfigError, match=f"{kind.__name__} finds no layer to rewrite"):
            quantize(net(), images()[0], "w3", improve=[kind(exclude=["*"])], **arguments)
