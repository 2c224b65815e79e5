"""Torch's encoder layers compute past their layers in eval; quantized ones must not."""

import copy

import pytest
import torch
from layer_helpers import ACTIVATION, insert, trained, weight_grid
from torch import nn

from lightning_opt.quantization.convert import convert, float_twin
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.layers import LayerPlan
from lightning_opt.quantization.quantizer import calibrating
from lightning_opt.quantization.state import freeze_observers, set_observing, switch_on

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def edit():
    plan = LayerPlan(weight=weight_grid(4), input=ACTIVATION)
    return QuantizeEdit({f"layers.{n}.linear{k}": plan for n in (0, 1) for k in (1, 2)})


@pytest.mark.parametrize("grad", [True, False])
def test_switched_off_it_is_the_float_layer_on_its_fast_path_too(grad):
    model = encoder()
    with torch.set_grad_enabled(grad):
        expected = model(X)
        assert torch.equal(insert(model, edit())(X), expected)


@pytest.mark.parametrize("scheme", ["training", "calibration"])
def test_answers_without_gradients_are_rounded(scheme):
    model = insert(encoder(), edit())
    dense = copy.deepcopy(model)(X).detach()
    if scheme == "training":
        trained(model, X)
    else:
        set_observing(model, True)
        with calibrating(), torch.no_grad():
            model(X)
        freeze_observers(model)
        switch_on(model)
        assert float(model.layers[0].linear1.input_quantizer.scale) != 1, "calibration saw the values"
    with torch.no_grad():  # attention has a fast path of its own, which rounds differently
        expected = model(X)
        assert float((expected - dense).abs().max()) > 1e-3
        torch.testing.assert_close(expected, torch.enable_grad()(model)(X))
        assert torch.equal(convert(model)(X), expected)


def test_a_float_twin_has_its_fast_path_back():
    model = convert(trained(insert(encoder(), edit()), X))
    twin = float_twin(model)
    assert type(twin.layers[0]) is nn.TransformerEncoderLayer
    assert twin.layers[0].activation_relu_or_gelu == 1
    assert model.layers[0].activation_relu_or_gelu == 0
