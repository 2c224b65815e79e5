"""SmoothQuant against equation 4 worked in numpy, and on activations with outliers."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.smooth import SmoothQuant, smoothing_factor
from lightning_opt.surgery import recipe_of


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factor_is_equation_four(alpha):
    activation, weight = draw(16).abs() + 0.1, draw(16, seed=1).abs() + 0.1
    by_hand = activation.double().numpy() ** alpha / weight.double().numpy() ** (1 - alpha)
    np.testing.assert_allclose(smoothing_factor(activation, weight, alpha).numpy(), by_hand, rtol=1e-6)


def test_channels_without_values_or_weights_keep_their_size():
    found = smoothing_factor(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert found.tolist() == [1.0, 1.0, 2.0]


class Net(nn.Module):
    """A layer norm, three of whose channels are outliers, read by two layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.left, self.right, self.head = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.norm(x)
        return self.head(torch.sigmoid(self.left(x)) * torch.tanh(self.right(x)))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.weight[torch.tensor([2, 7, 11])] = 60.0
        model.norm.bias.uniform_(-1.0, 1.0)
        model.left.weight[:, [2, 7, 11]] /= 60.0
        model.right.weight[:, [2, 7, 11]] /= 60.0
    return model


def test_answers_stay_and_the_factors_are_those_of_the_data():
    model, batches = net(), [draw(32, 16, seed=i) for i in range(4)]
    wanted = model(batches[0])
    outcome = SmoothQuant(alpha=0.4).improve(model, batches)
    assert outcome.changed == ("norm", "left", "right")
    torch.testing.assert_close(model(batches[0]), wanted, rtol=1e-4, atol=1e-5)
    seen = net().norm(torch.cat(batches)).detach().abs().amax(0).double().numpy()
    weights = torch.cat([net().left.weight, net().right.weight]).detach().abs().amax(0).double().numpy()
    factor = seen**0.4 / weights**0.6
    np.testing.assert_allclose((net().norm.weight / model.norm.weight).detach().numpy(), factor, rtol=1e-4)
    np.testing.assert_allclose((net().norm.bias / model.norm.bias).detach().numpy(), factor, rtol=1e-4)
    np.testing.assert_allclose((model.left.weight / net().left.weight)[3].detach().numpy(), factor, rtol=1e-4)
    assert len(recipe_of(model)) == 0


def test_outliers_cost_less():
    model, batches = net(), [draw(32, 16, seed=i) for i in range(4)]
    x = torch.cat(batches)
    with torch.no_grad():
        wanted = model(x)
        plain = quantize(model, x[:1], "w8a8", calibration=batches)(x) - wanted
        found = quantize(model, x[:1], "w8a8", calibration=batches, improve=[SmoothQuant()])(x) - wanted
    assert found.norm() < 0.4 * plain.norm()


def test_convolutions_are_smoothed_by_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2))
    x = draw(4, 3, 9, 9)
    wanted = model(x)
    activation = torch.relu(model[0](x)).detach().amax((0, 2, 3))
    reading = model[2].weight.detach().abs().amax((2, 3)).view(2, 2, 4).amax(1).flatten()
    before = model[0].weight.detach().clone()
    SmoothQuant().improve(model, [x[:2], x[2:]])
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    factor = (activation.double().numpy() / reading.double().numpy()) ** 0.5
    np.testing.assert_allclose((before / model[0].weight)[:, 0, 0, 0].detach().numpy(), factor, rtol=1e-4)


def test_what_cannot_be_smoothed_is_named():
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    with pytest.raises(ConfigError, match="SmoothQuant finds nothing to smooth in this model"):
        SmoothQuant().improve(model, [draw(4, 8)])
    with pytest.raises(ConfigError, match="SmoothQuant finds nothing"):
        SmoothQuant(exclude=["norm"]).improve(net(), [draw(4, 16)])
    with pytest.raises(ValueError, match=r"alpha must be from 0 to 1, not 1\.5"):
        SmoothQuant(alpha=1.5)


def test_smoothing_is_not_part_of_the_recipe():
    found = quantize(net(), draw(1, 16), Scheme(), calibration=[draw(32, 16)], improve=[SmoothQuant()])
    assert [edit.op for edit in recipe_of(found)] == ["quantize", "quantize_on", "convert"]
