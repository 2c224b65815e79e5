"""Bias correction: mean outputs of every layer are the float model's again, measured by hooks in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.quantization.bias_correction import BiasCorrection, correction
from lightning_opt.quantization.gptq import GPTQ
from lightning_opt.quantization.post_training import quantize, quantize_in_place


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_correction_is_the_difference_of_mean_outputs():
    rows, shifted = draw(200, 8) + 1.0, draw(200, 8) + 1.3
    weight, rounded = draw(2, 5, 8, seed=2), draw(2, 5, 8, seed=3)
    means = [x.double().mean(0).expand(2, -1) for x in (rows, shifted)]
    found = correction(weight, rounded, *means)
    for g in range(2):
        y = rows.double().numpy() @ weight[g].double().numpy().T
        z = shifted.double().numpy() @ rounded[g].double().numpy().T
        np.testing.assert_allclose(found[g].numpy(), (y - z).mean(0), rtol=1e-6, atol=1e-9)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.bare = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.grouped(x)).mean((2, 3))
        return self.head(torch.relu(self.bare(x)))


def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(count=4):
    return [draw(8, 3, 10, 10, seed=i) + 0.5 for i in range(count)]


def mean_outputs(model, names, batches):
    """Return the mean of each channel of what modules give, over samples and positions, in float64."""
    sums = {}

    def add(name):
        def hook(module, args, output):
            y = output.double()
            y = y.movedim(1, -1).flatten(0, -2) if y.dim() > 2 else y
            sums.setdefault(name, []).append(y)

        return hook

    handles = [getattr(model, name).register_forward_hook(add(name)) for name in names]
    with torch.no_grad():
        for x in batches:
            model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).mean(0) for name, parts in sums.items()}


@pytest.mark.parametrize("scheme", ["w3", "w3a8"])
def test_means_are_those_of_the_float_model_again(scheme):
    names = ("norm", "grouped", "head")  # the norm gives what the convolution with it folded in gives
    wanted = mean_outputs(net(), names, images())
    arguments = {"calibration": images(), "convert": False}
    plain = mean_outputs(quantize(net(), images()[0], scheme, **arguments), names, images())
    improved = quantize(net(), images()[0], scheme, improve=[BiasCorrection()], **arguments)
    found = mean_outputs(improved, names, images())
    for name in names:
        before = (plain[name] - wanted[name]).abs().max()
        after = (found[name] - wanted[name]).abs().max()
        assert before > 0.005
        assert after < (1e-5 if scheme == "w3" else 0.2 * before)


def test_weights_stay_and_the_batch_norm_takes_the_correction():
    arguments = {"calibration": images(), "convert": False}
    found = quantize(net(), images()[0], "w3", improve=[BiasCorrection()], **arguments)
    assert torch.equal(found.conv.weight, net().conv.weight)
    assert found.conv.bias is None
    assert found.bare.bias is None
    assert not torch.equal(found.norm.bias, net().norm.bias)
    assert not torch.equal(found.head.bias, net().head.bias)


def test_layers_without_a_bias_are_named():
    model = net()
    (outcome,) = quantize_in_place(model, images()[0], "w3", batches=images(), improve=[BiasCorrection()]).outcomes
    assert outcome.changed == ("conv", "grouped", "head")
    assert [(one.path, one.why) for one in outcome.refused] == [("bare", "it has no bias")]
    with pytest.raises(ConfigError, match="BiasCorrection finds no layer to rewrite"):
        quantize(net().head, draw(2, 8), "fp8", calibration=[draw(2, 8)], improve=[BiasCorrection()])


def test_after_gptq_the_float_model_is_still_the_one_before_it():
    names = ("grouped", "head")
    wanted = mean_outputs(net(), names, images())
    found = quantize(net(), images()[0], "w3", calibration=images(), improve=[GPTQ(), BiasCorrection()], convert=False)
    means = mean_outputs(found, names, images())
    assert max((means[name] - wanted[name]).abs().max() for name in names) < 1e-5
