import pytest
import torch
from layer_helpers import ACTIVATION, IDS, TiedNet, insert, shake, tied_edit, trained, weight_grid
from torch import nn

from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.layers import LayerPlan
from lightning_opt.quantization.observers import MSE
from lightning_opt.quantization.quantizer import calibrating
from lightning_opt.quantization.state import (
    freeze_observers,
    is_converted,
    is_quantized,
    quantizers,
    set_enabled,
    set_observing,
    switch_on,
    weight_quantizers,
)
from lightning_opt.surgery import recipe_of


def test_quantizers_are_found_by_name_and_shared_ones_once():
    model = insert(TiedNet(), tied_edit())
    assert set(quantizers(model)) == {
        "table.weight_quantizer",
        "conv.weight_quantizer",
        "conv.input_quantizer",
        "conv.output_quantizer",
        "act.site_quantizers.output_0",
        "hidden.weight_quantizer",
        "hidden.input_quantizer",
        "hidden.output_quantizer",
    }
    assert model.head.weight_quantizer is model.table.weight_quantizer
    assert [layer for layer, _ in weight_quantizers(model)] == [model.table, model.conv, model.hidden, model.head]


def test_a_model_says_what_it_is():
    model = TiedNet()
    assert (is_quantized(model), is_converted(model)) == (False, False)
    insert(model, tied_edit())
    assert (is_quantized(model), is_converted(model)) == (True, False)
    convert(trained(model, IDS))
    assert (is_quantized(model), is_converted(model)) == (True, True)


def test_inserted_quantizers_are_off_and_look_at_nothing():
    model = insert(TiedNet().eval(), tied_edit())
    assert not any(q.enabled or q.observing or q.training for q in quantizers(model).values())


def test_switching_on_is_written_down_and_off_is_the_float_model():
    torch.manual_seed(0)
    model = shake(TiedNet()).eval()
    expected = model(IDS)
    insert(model, tied_edit(2))
    switch_on(model)
    assert [edit.op for edit in recipe_of(model)] == ["quantize", "quantize_on"]
    set_observing(model, True)
    with calibrating():
        model(IDS)
    freeze_observers(model)
    rounded = model(IDS)
    assert not torch.equal(rounded, expected)
    set_enabled(model, False)
    assert torch.equal(model(IDS), expected)
    set_enabled(model, True)
    assert torch.equal(model(IDS), rounded)


def test_calibrated_ranges_are_kept_when_rounding_is_switched_on():
    torch.manual_seed(0)
    model = insert(shake(TiedNet()).eval(), tied_edit())
    set_observing(model, True)
    with calibrating():
        model(IDS)
    freeze_observers(model)
    assert all(q.is_fitted for q in quantizers(model).values())
    scales = {name: q.scale.clone() for name, q in quantizers(model).items()}
    switch_on(model)
    model.train()(IDS)
    assert not any(q.observing for q in quantizers(model).values())
    assert all(torch.equal(scales[name], q.scale) for name, q in quantizers(model).items())


def test_until_it_is_frozen_the_grid_of_a_weight_follows_the_weight():
    model = insert(nn.Sequential(nn.Linear(3, 2, bias=False)), QuantizeEdit({"0": LayerPlan(weight=weight_grid(3))}))
    switch_on(model)

    def answer():  # with unit inputs it is the rounded weight
        return model(torch.eye(3)).detach().T

    def rounded(weight, by):
        scale = by.abs().amax(1, keepdim=True).double() / 3
        return ((weight.double() / scale).round().clamp(-3, 3) * scale).float()

    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(2, 3))
        torch.testing.assert_close(answer(), rounded(model[0].weight, model[0].weight))
    fixed = model[0].weight.detach().clone()
    freeze_observers(model)
    with torch.no_grad():
        model[0].weight.mul_(3)
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(answer(), rounded(model[0].weight, fixed))


def test_a_costly_range_of_a_weight_is_searched_once():
    plan = LayerPlan(weight=weight_grid(3), weight_observer=MSE())
    model = insert(nn.Sequential(nn.Linear(40, 2)), QuantizeEdit({"0": plan}))
    switch_on(model)
    scale = model[0].weight_quantizer.scale.clone()
    widest = model[0].weight.abs().amax(1) / 3
    assert bool((scale < widest * 0.999).all()), "the least squared error cuts off the largest weights"
    set_observing(model, True)
    model.train()(torch.randn(5, 40))
    assert torch.equal(model[0].weight_quantizer.scale, scale)


def test_nothing_is_observed_in_eval():
    model = insert(nn.Sequential(nn.Linear(3, 2)), QuantizeEdit({"0": LayerPlan(output=ACTIVATION)}))
    switch_on(model)
    model.eval()(torch.ones(1, 3))
    assert not model[0].output_quantizer.is_fitted
    model.train()(torch.ones(1, 3))
    assert model[0].output_quantizer.is_fitted


def test_learned_steps_of_weights_start_at_the_least_squared_error():
    torch.manual_seed(0)
    plan = LayerPlan(weight=weight_grid(2), learnable=True)
    model = insert(nn.Sequential(nn.Linear(200, 3)), QuantizeEdit({"0": plan}))
    with torch.no_grad():
        model[0].weight.normal_()
    switch_on(model)
    weight = model[0].weight.detach().double()

    def error(step):
        return ((weight / step).round().clamp(-1, 1) * step - weight).square().sum(1)

    best = torch.stack([error(s) for s in torch.linspace(0.3, 3, 400)]).min(0).values
    got = error(model[0].weight_quantizer.scale.detach().double()[:, None])
    assert bool((got <= best * 1.02).all())


@pytest.mark.parametrize("shift", [0.0, 4.0])
def test_learned_ranges_start_from_what_was_seen(shift):
    plan = LayerPlan(output=ACTIVATION, learnable=True)
    model = insert(nn.Sequential(nn.Linear(3, 2)), QuantizeEdit({"0": plan}))
    set_observing(model, True)
    answer = model.train()(torch.randn(50, 3) + shift)
    switch_on(model)
    width = answer.max().clamp(min=0) - answer.min().clamp(max=0)
    torch.testing.assert_close(model[0].output_quantizer.scale[0], width / 255)
