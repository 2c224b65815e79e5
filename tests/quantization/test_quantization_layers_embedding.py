import pytest
import torch
from layer_helpers import insert, trained
from torch import nn

from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers import LayerPlan
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.state import freeze_observers, switch_on

IDS = torch.tensor([[1, 2, 3, 2], [10, 0, 1, 1]])


def table(grid, layer=None, **plan):
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Embedding(11, 6))
    return insert(model, QuantizeEdit({"0": LayerPlan(weight=grid, **plan)}))


@pytest.mark.parametrize("group_size", [None, 4])
def test_rows_are_rounded_as_the_whole_table_would_be(group_size):
    model = table(Grid(bits=4, axis=0, group_size=group_size)).train()
    switch_on(model)
    got = model(IDS)
    weight = model[0].weight.detach().double()
    parts = weight.split(group_size or 6, dim=1)
    rounded = torch.cat([(p / (s := p.abs().amax(1, keepdim=True) / 7)).round() * s for p in parts], dim=1)
    torch.testing.assert_close(got.double(), rounded[IDS], rtol=1e-6, atol=1e-7)


def test_only_the_rows_that_are_looked_up_are_rounded(monkeypatch):
    """A step over a large table must not cost a pass over the table."""
    model = table(Grid(axis=0)).train()
    switch_on(model)
    monkeypatch.setattr(FakeQuantizer, "forward", lambda *_: pytest.fail("the whole table was rounded"))
    model(IDS)


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_reach_the_rows_that_were_looked_up(bag, frozen):
    layer = nn.EmbeddingBag(11, 6, mode="sum") if bag else nn.Embedding(11, 6, padding_idx=2)
    model = table(Grid(axis=0), layer).train()
    switch_on(model)
    if frozen:
        freeze_observers(model)
    model(IDS).sum().backward()
    counts = torch.bincount(IDS.flatten(), minlength=11).float()
    if not bag:
        counts[2] = 0  # the padding's row gets no gradient
    torch.testing.assert_close(model[0].weight.grad, counts[:, None].expand(11, 6), rtol=0, atol=0)


def test_sparse_gradients_stay_sparse():
    model = table(Grid(axis=0), nn.Embedding(11, 6, sparse=True)).train()
    switch_on(model)
    model(IDS).sum().backward()
    assert model[0].weight.grad.is_sparse


def test_learned_steps_get_the_gradient_of_the_formula():
    """Esser et al. (2019), equation 3 and section 2.2: every look-up of a row adds to the gradient of its step."""
    model = table(Grid(bits=3, axis=0), learnable=True).train()
    switch_on(model)
    quantizer, weight = model[0].weight_quantizer, model[0].weight.detach().double()
    with torch.no_grad():
        quantizer.scale.mul_(0.8)  # so that some values are clipped
    coefficients = torch.randn(2, 4, 6)
    (model(IDS) * coefficients).sum().backward()
    step = quantizer.scale.detach().double()[:, None]
    ratio = weight / step
    of_step = torch.where(ratio.abs() >= 3, ratio.sign() * 3, ratio.round() - ratio)
    expected = torch.zeros(11, dtype=torch.float64)
    expected.index_add_(0, IDS.flatten(), (coefficients.double() * of_step[IDS]).sum(-1).flatten())
    expected /= (6 * 3) ** 0.5
    torch.testing.assert_close(quantizer.scale.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_learned_step_that_went_past_zero_comes_back():
    model = table(Grid(bits=4, axis=0), learnable=True).train()
    switch_on(model)
    with torch.no_grad():
        model[0].weight_quantizer.scale[IDS[0, 0]] = -0.1
    assert torch.isfinite(model(IDS)).all()
    assert bool((model[0].weight_quantizer.scale > 0).all())
    with torch.no_grad():
        model[0].weight_quantizer.scale[IDS[0, 0]] = -0.1
    expected = model.eval()(IDS)
    assert torch.equal(convert(model)(IDS), expected)
    assert bool((model[0].weight_scale > 0).all())


def test_bags_with_offsets_and_weights_convert():
    model = table(Grid(bits=4, axis=0), nn.EmbeddingBag(11, 6, mode="sum"))
    trained(model, IDS)
    ids, offsets, weights = IDS.flatten(), torch.tensor([0, 3]), torch.rand(8)
    expected = model[0](ids, offsets, per_sample_weights=weights)
    convert(model)
    assert torch.equal(model[0](ids, offsets, per_sample_weights=weights), expected)
    whole = nn.functional.embedding_bag(ids, model[0].float_weight(), offsets, mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(expected, whole)


def test_the_dtype_of_the_answer_survives_conversion_and_moves():
    model = trained(table(Grid(bits=4, axis=0), nn.Embedding(11, 6, dtype=torch.bfloat16)), IDS)
    expected = model(IDS)
    convert(model)
    assert model(IDS).dtype == torch.bfloat16
    assert torch.equal(model(IDS), expected)
    assert model.float()(IDS).dtype == torch.float32


def test_scalar_and_empty_look_ups_work():
    model = trained(table(Grid(bits=4, axis=0)), IDS)
    freeze_observers(model)
    for _ in ("rounded", "converted"):
        assert model(torch.tensor(3)).shape == (6,)
        assert model(torch.empty(0, 4, dtype=torch.long)).shape == (0, 4, 6)
        convert(model)
