"""Cross-layer equalization: equation 11 in numpy, equal ranges at the end, answers that stay."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.quantization.equalize import CrossLayerEqualization, equalizing_factor
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.scheme import Scheme


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_factor_makes_both_ranges_their_geometric_mean():
    first, second = draw(16).abs() + 0.01, draw(16, seed=1).abs() + 0.01
    factor = equalizing_factor(first, second).double().numpy()
    one, other = first.double().numpy(), second.double().numpy()
    np.testing.assert_allclose(factor, np.sqrt(one * other) / other, rtol=1e-6)
    np.testing.assert_allclose(one / factor, other * factor, rtol=1e-5)
    assert equalizing_factor(torch.tensor([0.0, 2.0, 8.0]), torch.tensor([3.0, 0.0, 2.0])).tolist() == [1.0, 1.0, 2.0]


def net():
    """A convolution with a batch norm, a depthwise one, one over both, a linear layer: channels of very unlike size."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    with torch.no_grad():
        model[1].weight.copy_(draw(8, seed=1).mul(1.5).exp())
        model[1].bias.copy_(model[1].weight * draw(8, seed=4) / 2)
        model[1].running_mean.uniform_(-0.5, 0.5)
        model[1].running_var.uniform_(0.5, 2.0)
        # Each channel is scaled here and scaled back in the next layer, so that all of them matter alike.
        sizes = [draw(n, seed=seed).mul(1.5).exp() for seed, n in ((1, 8), (2, 8), (3, 12))]
        model[3].weight.div_(sizes[0].view(-1, 1, 1, 1)).mul_(sizes[1].view(-1, 1, 1, 1))
        model[3].bias.mul_(sizes[1])
        model[5].weight.div_(sizes[1].view(-1, 1, 1)).mul_(sizes[2].view(-1, 1, 1, 1))
        model[5].bias.mul_(sizes[2])
        model[9].weight.div_(sizes[2])
    return model.eval()


def test_ranges_are_equal_and_answers_stay():
    model, x = net(), draw(4, 3, 9, 9)
    wanted = model(x)
    outcome = CrossLayerEqualization(rounds=100, tolerance=1e-6).improve(model, [x])
    assert outcome.changed == ("1", "3", "5", "9")
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    state = {name: value.double() for name, value in model.state_dict().items()}
    folded = state["0.weight"] * (state["1.weight"] / (state["1.running_var"] + 1e-5).sqrt()).view(-1, 1, 1, 1)
    ranges = [
        (folded.abs().amax((1, 2, 3)), state["3.weight"].abs().amax((1, 2, 3))),
        (state["3.weight"].abs().amax((1, 2, 3)), state["5.weight"].abs().amax((0, 2, 3))),
        (state["5.weight"].abs().amax((1, 2, 3)), state["9.weight"].abs().amax(0)),
    ]
    for made, read in ranges:
        torch.testing.assert_close(made, read, rtol=1e-4, atol=1e-7)


def test_it_saves_weights_that_share_one_scale():
    model, batches = net(), [draw(16, 3, 9, 9, seed=i) for i in range(3)]
    x, scheme = torch.cat(batches), Scheme(weight=Grid(bits=8), activation=None)
    with torch.no_grad():
        wanted = model(x)
        plain = quantize(model, x[:1], scheme)(x) - wanted
        found = quantize(model, x[:1], scheme, calibration=batches, improve=[CrossLayerEqualization()])(x) - wanted
    assert found.norm() < 0.5 * plain.norm()


def test_what_bends_values_is_no_neighbour():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="CrossLayerEqualization finds no neighbours in this model"):
        CrossLayerEqualization().improve(model, [draw(4, 8)])
    norm_only = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="CrossLayerEqualization finds no neighbours"):
        CrossLayerEqualization().improve(norm_only, [draw(4, 8)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"tolerance": -1.0}, r"tolerance must be at least 0, not -1\.0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossLayerEqualization(**arguments)
