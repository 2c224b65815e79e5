import copy

import numpy as np
import pytest
import torch
from layer_helpers import ACTIVATION, insert, shake, trained
from torch import nn

from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers import FoldedBatchNorm, LayerPlan
from lightning_opt.quantization.state import freeze_batch_norm, freeze_observers, set_enabled, switch_on


def net(bias=True, **norm):
    torch.manual_seed(0)
    return shake(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, **norm), nn.ReLU()))


def edit(bits=4, output=None):
    plan = LayerPlan(weight=Grid(bits=bits, axis=0), output=output, batch_norm="1")
    return QuantizeEdit({"0": plan})


X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def conv64(x, w):
    """Convolve without padding, in numpy's float64."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))
    return np.einsum("bihwkl,oikl->bohw", windows, w)


def rounded64(w, bits):
    scale = np.abs(w).reshape(len(w), -1).max(1) / (2 ** (bits - 1) - 1)
    scale = np.where(scale == 0, 1, scale)[:, None, None, None]
    return np.round(w / scale) * scale


def arrays(model):
    conv, norm = model[0], model[1]
    found = [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return [None if t is None else t.detach().double().numpy().copy() for t in found]


@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_simulated_in_training(bias):
    """Krishnamoorthi (2018), section 3.2.2, figure 8: round w * gamma / sigma, scale back, normalise by the batch."""
    model = insert(net(bias).train(), edit())
    w, b, gamma, beta, mean, var = arrays(model)
    switch_on(model)
    answer = model(X)
    factor = (gamma / np.sqrt(var + 1e-5))[:, None, None, None]
    y = conv64(X.double().numpy(), rounded64(w * factor, 4)) / factor[None, :, 0, 0, 0, None, None]
    y = y + (0 if b is None else b[:, None, None])
    of_batch, spread = y.mean((0, 2, 3)), y.var((0, 2, 3))
    normal = (y - of_batch[:, None, None]) / np.sqrt(spread + 1e-5)[:, None, None]
    expected = np.maximum(normal * gamma[:, None, None] + beta[:, None, None], 0)
    np.testing.assert_allclose(answer.detach().numpy(), expected, rtol=2e-4, atol=2e-5)
    count = y.size / 4
    np.testing.assert_allclose(model[1].running_mean, 0.9 * mean + 0.1 * of_batch, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model[1].running_var, 0.9 * var + 0.1 * spread * count / (count - 1), rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_folding_is_done_in_eval_and_once_frozen(bias, frozen):
    model = insert(net(bias).train(), edit())
    w, b, gamma, beta, mean, var = arrays(model)
    switch_on(model)
    if frozen:
        freeze_batch_norm(model)
    else:
        model.eval()
    answer = model(X)
    factor = gamma / np.sqrt(var + 1e-5)
    y = conv64(X.double().numpy(), rounded64(w * factor[:, None, None, None], 4))
    moved = ((0 if b is None else b) - mean) * factor + beta
    np.testing.assert_allclose(answer.detach().numpy(), np.maximum(y + moved[:, None, None], 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model[1].running_mean, mean.astype(np.float32))
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_float_net_when_rounding_is_fine(frozen):
    """With 8 bits the gradients are nearly those of the same net in float64 whose norm uses the same statistics."""
    model = net().train()
    twin = copy.deepcopy(model).double()
    insert(model, edit(bits=8))
    switch_on(model)
    if frozen:
        freeze_batch_norm(model)
        twin[1].eval()
    target = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    (model[1](model[0](X)) - target).square().mean().backward()
    (twin[1](twin[0](X.double())) - target).square().mean().backward()
    for name in ("0.weight", "1.weight", "1.bias"):
        ours, theirs = model.get_parameter(name).grad, twin.get_parameter(name).grad
        assert float(theirs.abs().max()) > 1e-3, name
        assert float((ours - theirs).norm() / theirs.norm()) < 0.03, name


def test_a_channel_whose_gamma_is_zero_stays_finite_and_learns():
    model = net().train()
    with torch.no_grad():
        model[1].weight[1] = 0
        model[1].weight[2] = 1e-30
    insert(model, edit())
    switch_on(model)
    answer = model[1](model[0](X))
    (answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert torch.isfinite(answer).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert float(model[1].weight.grad[1].abs()) > 0
    expected = model[1].bias[1].relu().expand(5, 4, 4)
    torch.testing.assert_close(model.eval()(X)[:, 1], expected, rtol=0, atol=0)


def test_freezing_reaches_norms_that_nothing_is_folded_into():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).train()
    shake(nn.Sequential(model[0]))
    before = model[0].running_mean.clone()
    names = list(model.state_dict())
    freeze_batch_norm(model)
    got = model[0](X)
    expected = nn.functional.batch_norm(
        X, before, model[0].running_var, model[0].weight, model[0].bias, training=False, eps=model[0].eps
    )
    assert torch.equal(got, expected)
    assert torch.equal(model[0].running_mean, before)
    got.sum().backward()
    assert model[0].weight.grad is not None
    assert list(model.state_dict()) == names
    freeze_batch_norm(model, False)
    model[0](X)
    assert not torch.equal(model[0].running_mean, before)


def test_a_norm_that_the_user_froze_is_folded_in_training_too():
    """Fine-tuning with `norm.eval()`: the statistics are final, so there is nothing to simulate."""
    model = insert(net().train(), edit())
    switch_on(model)
    model[1].eval()
    in_training = model(X)
    torch.testing.assert_close(in_training, model.eval()(X), rtol=0, atol=0)


@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"eps": 0.1}, {"momentum": None}])
def test_every_norm_converts(norm):
    model = trained(insert(net(**norm), edit(output=ACTIVATION)), X)
    expected = model(X)
    frozen = copy.deepcopy(model)
    freeze_observers(frozen)
    for each in (model, frozen):
        convert(each)
        assert type(each[1]) is FoldedBatchNorm
        assert torch.equal(each(X), expected)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"0"}


def test_the_output_is_rounded_after_the_norm():
    model = insert(net(), edit(output=ACTIVATION))
    trained(model, X)
    quantizer = model[0].output_quantizer
    for stage in ("rounded", "converted"):
        between = model[:2](X)
        steps = between / quantizer.scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3, msg=stage)
        assert (steps.max() - steps.min()).item() > 50
        convert(model)


def test_while_weights_are_off_the_norm_is_itself_and_its_output_is_still_rounded():
    model = trained(insert(net(), edit(output=ACTIVATION)), X)
    float_answer = nn.functional.batch_norm(
        nn.functional.conv2d(X, model[0].weight, model[0].bias),
        model[1].running_mean,
        model[1].running_var,
        model[1].weight,
        model[1].bias,
    )
    model[0].weight_quantizer.enabled = False
    difference = (model[:2](X) - float_answer).abs().max().item()
    assert 0 < difference <= model[0].output_quantizer.scale.item() * 2
    set_enabled(model, False)
    assert torch.equal(model[:2](X), float_answer)


def test_linear_layers_fold_too():
    torch.manual_seed(0)
    model = shake(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    x = torch.randn(8, 6)
    insert(model, QuantizeEdit({"0": LayerPlan(weight=Grid(axis=0), batch_norm="1")}))
    expected = trained(model, x)(x)
    assert torch.equal(convert(model)(x), expected)


@pytest.mark.parametrize(
    ("norm", "word"),
    [
        (nn.BatchNorm2d(5), "5 channels"),
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
    ],
)
def test_norms_that_cannot_be_folded_are_refused(norm, word):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    with pytest.raises(ValueError, match=f"'1' cannot be folded into '0': .*{word}"):
        edit().apply(model)
    assert type(model[0]) is nn.Conv2d


def test_a_norm_is_folded_into_one_layer_only():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1))
    plan = LayerPlan(weight=Grid(axis=0), batch_norm="1")
    with pytest.raises(ValueError, match="folded into another layer"):
        QuantizeEdit({"0": plan, "2": plan}).apply(model)
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="groups"):
        QuantizeEdit({"0": plan}).apply(grouped)
