"""Each improvement on a convolutional net that was trained on digits, beside plain rounding to nearest."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_opt.quantization.adaround import AdaRound
from lightning_opt.quantization.bias_correction import BiasCorrection
from lightning_opt.quantization.equalize import CrossLayerEqualization
from lightning_opt.quantization.gptq import GPTQ
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.rescaling import Neighbours, rescale
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.smooth import SmoothQuant

datasets = pytest.importorskip("sklearn.datasets")
TRAIN, TEST = slice(0, 1200), slice(1200, None)


@pytest.fixture(scope="module")
def digits():
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.5
    return x[order], torch.tensor(labels)[order]


def layer(inputs, outputs, **arguments):
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **arguments), nn.BatchNorm2d(outputs), nn.ReLU()]


@pytest.fixture(scope="module", params=[0, 1])
def net(request, digits):
    x, y = (part[TRAIN] for part in digits)
    torch.manual_seed(request.param)
    body = [*layer(1, 12), *layer(12, 12, groups=12), *layer(12, 16, stride=2), *layer(16, 24, stride=2)]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(8):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def divergence(net, digits, scheme, improve=()):
    """Return the Kullback-Leibler divergence of the float model's answers to the test set from the quantized one's."""
    x = digits[0]
    found = quantize(net, x[:1], scheme, calibration=x[:256].split(64), improve=improve)(x[TEST])
    wanted = net(x[TEST]).log_softmax(1)
    return functional.kl_div(found.log_softmax(1), wanted, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize(
    ("improve", "limit"),
    [
        ([BiasCorrection()], 0.7),
        ([GPTQ()], 0.85),
        ([AdaRound(steps=60)], 0.5),
        ([GPTQ(), BiasCorrection()], 0.7),
    ],
    ids=["bias_correction", "gptq", "adaround", "gptq_and_bias_correction"],
)
def test_weights_of_three_bits(net, digits, improve, limit):
    plain = divergence(net, digits, "w3a8")
    assert plain > 0.02
    assert divergence(net, digits, "w3a8", improve) < limit * plain


@contextlib.contextmanager
def unbalanced(net, digits, groups):
    """Divide channels by factors and multiply them back where they are read: the same answers, unlike sizes."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x = digits[0][:64]
    wanted = net(x).detach()
    try:
        for (producer, norm, reader), factor in groups:
            rescale(net, Neighbours(producer=producer, norm=norm, readers=(reader,)), factor)
        torch.testing.assert_close(net(x).detach(), wanted, rtol=1e-3, atol=1e-3)
        yield net
    finally:
        net.load_state_dict(state)


def test_equalization_where_channels_of_one_scale_are_of_unlike_size(net, digits):
    scheme = Scheme(weight=Grid(bits=8), activation=None)
    sizes = [torch.randn(n, generator=torch.Generator().manual_seed(n)).mul(1.5).exp() for n in (12, 16)]
    groups = [(("0", "1", "3"), sizes[0]), (("6", "7", "9"), sizes[1])]
    with unbalanced(net, digits, groups) as large:
        plain = divergence(large, digits, scheme)
        assert divergence(large, digits, scheme, [CrossLayerEqualization()]) < 0.5 * plain


def test_smoothing_where_channels_are_outliers(net, digits):
    factor = torch.ones(16)
    factor[torch.tensor([3, 8])] = 1 / 60
    with unbalanced(net, digits, [(("6", "7", "9"), factor)]) as large:
        plain = divergence(large, digits, "w8a8")
        assert divergence(large, digits, "w8a8", [SmoothQuant()]) < 0.3 * plain
