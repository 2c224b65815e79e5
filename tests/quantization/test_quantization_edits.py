import copy
import json

import pytest
import torch
from layer_helpers import ACTIVATION, IDS, TiedNet, insert, shake, tied_edit, trained, weight_grid
from torch import nn

from lightning_opt.pruning import shrink
from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import Convert, QuantizeEdit, SwitchOn
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers import IntegerLayer, LayerPlan, QuantizedLayer
from lightning_opt.quantization.observers import MSE, MovingAverage
from lightning_opt.quantization.state import freeze_observers, quantizers, switch_on
from lightning_opt.surgery import Recipe, recipe_of, replay


def test_an_edit_is_plain_json_and_comes_back_equal():
    edit = tied_edit(4, learnable=True, weight_observer=MSE(), activation_observer=MovingAverage(momentum=0.1))
    recipe = Recipe([edit, SwitchOn(), Convert()])
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    written = json.loads(text)
    assert [each["op"] for each in written] == ["quantize", "quantize_on", "convert"]
    assert written[0]["layers"]["head"]["weight"] == {"bits": 4, "axis": 0}
    assert Recipe.from_json(text).edits[0].plans["conv"].activation_observer == MovingAverage(momentum=0.1)
    assert hash(edit) == hash(tied_edit(4, learnable=True))


@pytest.mark.parametrize("values", [{}, {"learnable": True}, {"weight_observer": MSE()}])
def test_a_replayed_recipe_and_the_state_give_the_same_answers(values):
    torch.manual_seed(0)
    model = trained(insert(shake(TiedNet()), tied_edit(4, **values)), IDS)
    freeze_observers(model)
    expected = model(IDS)
    for stage in ("rounded", "converted"):
        recipe = Recipe.from_json(recipe_of(model).to_json())
        fresh = replay(TiedNet(), recipe)
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(fresh.eval()(IDS), expected), stage
        assert [type(each) for each in fresh.modules()] == [type(each) for each in model.modules()]
        convert(model)


def test_a_recipe_of_a_part_is_moved_into_the_whole():
    torch.manual_seed(0)
    inner = trained(insert(shake(TiedNet()), tied_edit(4)), IDS)
    expected = convert(inner)(IDS)

    class Outer(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, ids):
            return self.net(ids)

    edits = [edit.under("net") for edit in recipe_of(inner)]
    whole = replay(Outer(TiedNet()), Recipe(edits))
    whole.load_state_dict(Outer(inner).state_dict())
    assert torch.equal(whole.eval()(IDS), expected)


def test_a_part_is_switched_on_and_converted_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    insert(model, QuantizeEdit({name: LayerPlan(weight=weight_grid()) for name in "01"}))
    SwitchOn("1").apply(model)
    assert [each.weight_quantizer.enabled for each in model] == [False, True]
    Convert("1").apply(model)
    assert isinstance(model[0], QuantizedLayer)
    assert isinstance(model[1], IntegerLayer)


@pytest.mark.parametrize(
    ("layers", "sites", "message"),
    [
        ({"conw": LayerPlan(weight=weight_grid())}, {}, "layers: 'conw' names no module of TiedNet"),
        ({"act": LayerPlan(weight=weight_grid())}, {}, "layers: 'act' .*ReLU is no kind of layer"),
        (
            {"conv": LayerPlan(weight=weight_grid(), batch_norm="nor")},
            {},
            "batch_norm of 'conv': 'nor' names no module",
        ),
        ({}, {"akt": [["output", 0, {"grid": {}}]]}, "sites: 'akt' names no module"),
        ({"conv": LayerPlan(weight=weight_grid(), batch_norm="act")}, {}, "'act' cannot be folded.*ReLU"),
        (
            {"conv": LayerPlan(weight=weight_grid(), batch_norm="norm")},
            {"norm": [["output", 0, {"grid": {}}]]},
            "sites: 'norm' is folded into a layer",
        ),
    ],
)
def test_what_an_edit_cannot_find_is_named_and_nothing_changes(layers, sites, message):
    model = TiedNet()
    before = [type(each) for each in model.modules()]
    edit = QuantizeEdit({"hidden": LayerPlan(weight=weight_grid()), **layers}, sites)
    with pytest.raises(ValueError, match=message):
        edit.apply(model)
    assert [type(each) for each in model.modules()] == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": {"a": {"wait": {}}}}, "layers: 'a': 'wait' is not known of a layer's plan"),
        ({"layers": {"a": {"weight": {"bits": 9}}}}, "layers: 'a': bits must be from 2 to 8"),
        ({"layers": {"a": {"weight": {"bits": 4}, "learnable": 1}}}, "learnable must be true or false"),
        ({"layers": {"a": {}}}, "must quantize its weight, its input or its output"),
        ({"layers": {"a": {"input": {}, "batch_norm": "b"}}}, "batch_norm='b' needs"),
        ({"layers": {"a": {"weight": 8}}}, "layers: 'a': weight must be a Grid"),
        ({"layers": {"a": {"weight": {}, "weight_observer": "guess"}}}, "observer 'guess' is not known"),
        ({"layers": []}, "layers must be an object"),
        ({"layers": {}, "sites": {"a": "relu"}}, "sites of 'a' must be lists"),
        ({"layers": {}, "sites": {"a": [["relu", 0]]}}, "a site is"),
        ({"layers": {}, "sites": {"a": [["relu", 0, {"grid": {"bits": 1}}]]}}, "sites of 'a': bits"),
        ({"layers": {}, "sites": {"a": [["relu", 0, {"grid": {}, "watcher": 1}]]}}, "'watcher' is not known"),
    ],
)
def test_values_of_an_edit_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Recipe([{"op": "quantize", **values}])


def test_a_layer_is_not_quantized_twice():
    model = insert(TiedNet(), tied_edit())
    with pytest.raises(ValueError, match=r"'table' .* it is quantized already"):
        tied_edit().apply(model)
    with pytest.raises(ValueError, match="path: 'nowhere' names no module"):
        SwitchOn("nowhere").apply(model)


class Pruned(nn.Module):
    """A net whose inner widths can be cut."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.hidden(self.last(x).mean((2, 3)))))


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("learned", [{}, {"learnable": True}])
@pytest.mark.parametrize("searched", [{}, {"weight_observer": MSE(steps=10)}])
@pytest.mark.parametrize("group_size", [None, 4])
def test_a_shrink_between_insertion_and_switching_on(learned, searched, group_size):
    """Scales of channels follow the weights; the learned ones stay the objects that the optimizer holds."""
    torch.manual_seed(0)
    model = shake(Pruned()).eval()
    grid, values = Grid(bits=4, axis=0, group_size=group_size), {**learned, **searched}
    plans = {name: LayerPlan(weight=grid, output=ACTIVATION, **values) for name in ("last", "hidden", "head")}
    plans["conv"] = LayerPlan(weight=grid, output=ACTIVATION, batch_norm="norm", **values)
    insert(model, QuantizeEdit(plans))
    scales = {name: q.scale for name, q in quantizers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    twin = shake(Pruned()).eval()
    twin.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "quantizer" not in name})
    recipe = shrink(model, (X,), ratio=0.5)
    assert torch.equal(model(X), replay(twin, recipe)(X)), "switched off, it is the float model that was shrunk"
    assert model.conv.out_channels == 4
    switch_on(model)
    assert model.conv.weight_quantizer.scale.numel() == model.conv.weight_quantizer.grid.channels(model.conv.weight)
    model.train()
    for quantizer in quantizers(model).values():
        quantizer.observing = True
    model(X)
    for quantizer in quantizers(model).values():
        if quantizer.observer is not None:
            quantizer.fit()
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    if values.get("learnable"):
        assert all(scales[name] is q.scale for name, q in quantizers(model).items())
        assert (
            optimizer.state[model.conv.weight_quantizer.scale]["exp_avg"].shape
            == model.conv.weight_quantizer.scale.shape
        )
    freeze_observers(model.eval())
    expected = model(X)
    assert [edit.op for edit in recipe_of(model)] == ["quantize", "shrink", "quantize_on"]
    fresh = replay(Pruned(), recipe_of(model))
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh.eval()(X), expected)
    assert torch.equal(convert(model)(X), expected)
    whole = replay(Pruned(), recipe_of(model))
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole.eval()(X), expected)
