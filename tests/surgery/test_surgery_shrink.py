"""A shrink cuts what it names and nothing else, keeps objects, and checks everything before it changes anything."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_opt.errors import UntrustedInputError
from lightning_opt.surgery import Recipe, Shrink, recipe_of, record, replay


class Net(nn.Module):
    """A convolution, batch norm and a head; the width of the middle can go."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.scale, self.sizes, self.name = 0.5, (8, 4), "net"

    def forward(self, x):
        return self.head(functional.relu(self.norm(self.conv(x))).mean((2, 3)))


KEPT = [0, 3, 4, 7]
CHANNELS = {name: {0: KEPT} for name in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")}
BUFFERS = {"norm.running_mean": {0: KEPT}, "norm.running_var": {"0": KEPT}}
ATTRIBUTES = {
    "conv": {"out_channels": 4},
    "norm": {"num_features": 4},
    "head": {"in_features": 4},
    "": {"sizes": [4, 4], "scale": 0.25},
}


def edit():
    return Shrink(kept={**CHANNELS, **BUFFERS, "head.weight": {1: KEPT}}, attributes=ATTRIBUTES)


def fresh():
    torch.manual_seed(0)
    model = Net()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    return model


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_small_model_answers_as_the_masked_one():
    model = fresh()
    masked = copy.deepcopy(model).eval()
    gone = [place for place in range(8) if place not in KEPT]
    masked.head.weight.data[:, gone] = 0
    x = torch.randn(2, 3, 5, 5)
    assert edit().apply(model) is model
    assert torch.allclose(model.eval()(x), masked(x), atol=1e-6)
    assert [tuple(value.shape) for value in model.state_dict().values()] == [
        *((4, 3, 3, 3), (4,), (4,), (4,), (4,), (4,), (), (4, 4), (4,)),
    ]
    assert (model.conv.out_channels, model.norm.num_features, model.head.in_features) == (4, 4, 4)
    assert (model.sizes, model.scale) == ((4, 4), 0.25)


def test_objects_stay_and_gradients_go():
    model = fresh()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    before, buffer = list(model.parameters()), model.norm.running_mean
    edit().apply(model)
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))
    assert model.norm.running_mean is buffer
    assert model.conv.weight.grad is None
    assert model.head.bias.grad is not None  # it was not touched
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert model.conv.weight.grad.shape == (4, 3, 3, 3)


def test_a_tied_weight_is_cut_once_under_either_name():
    for names in (["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]):
        model = nn.ModuleDict({"embed": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
        model["head"].weight = model["embed"].weight
        expected = model["embed"].weight.detach()[:, [1, 5]]
        Shrink(kept={name: {1: [1, 5]} for name in names}).apply(model)
        assert model["head"].weight is model["embed"].weight
        assert torch.equal(model["embed"].weight.detach(), expected)
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6), "head": nn.Linear(6, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match=r"embed\.weight.*head\.weight"):
        Shrink(kept={"embed.weight": {1: [1, 5]}, "head.weight": {1: [0]}}).apply(model)


def test_several_dims_and_the_memory_format():
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    expected = model.weight.detach()[[1, 2]][:, [0, 5, 6]]
    Shrink(kept={"weight": {0: [1, 2], 1: [0, 5, 6]}, "bias": {0: [1, 2]}}).apply(model)
    assert torch.equal(model.weight.detach(), expected)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("kept", "attributes", "words"),
    [
        ({"conv.wieght": {0: [0]}}, {}, "conv.wieght"),
        ({"conv.weight": {4: [0]}}, {}, r"conv\.weight.*\(8, 3, 3, 3\).*dim 4"),
        ({"conv.weight": {0: [0, 8]}}, {}, r"conv\.weight.*index 8 of dim 0.*8 entries"),
        ({}, {"cnov": {"out_channels": 4}}, "cnov"),
        ({}, {"conv": {"out_chanels": 4}}, "out_chanels"),
        ({}, {"": {"forward": 4}}, "forward"),
        ({}, {"": {"name": 4}}, "name"),
        ({}, {"": {"sizes": 4}}, "sizes"),
        ({}, {"": {"training": 1}}, "training"),
        ({}, {"": {"_modules": 1}}, "_modules"),
        ({}, {"conv": {"weight": 1}}, "weight"),
    ],
)
def test_nothing_changes_when_anything_is_wrong(kept, attributes, words):
    model = fresh()
    before, numbers = snapshot(model), dict(vars(model.conv))
    wrong = Shrink(kept={**CHANNELS, **kept}, attributes={"conv": {"out_channels": 4}, **attributes})
    with pytest.raises(ValueError, match=words):
        wrong.apply(model)
    assert {name: value.shape for name, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert vars(model.conv) == numbers


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kept": {"w": {0: []}}}, "keep nothing"),
        ({"kept": {"w": {0: [1, 1]}}}, "rise"),
        ({"kept": {"w": {0: [2, 1]}}}, "rise"),
        ({"kept": {"w": {0: [-1, 1]}}}, "rise"),
        ({"kept": {"w": {0: [True]}}}, "whole numbers"),
        ({"kept": {"w": {0: "01"}}}, "whole numbers"),
        ({"kept": {"w": {"x": [1]}}}, "dim"),
        ({"kept": {"w": {"-1": [1]}}}, "dim"),
        ({"kept": {"w": {"0": [1], 0: [1]}}}, "dim once"),
        ({"kept": {"w": [1]}}, "object"),
        ({"kept": []}, "object"),
        ({"kept": {}, "attributes": {"a": {"__class__": 1}}}, "__class__"),
        ({"kept": {}, "attributes": {"a": {"b.c": 1}}}, "b.c"),
        ({"kept": {}, "attributes": {"a": {"b": "text"}}}, "number"),
        ({"kept": {}, "attributes": {"a": {"b": True}}}, "number"),
        ({"kept": {}, "attributes": {"a": {"b": float("nan")}}}, "finite"),
        ({"kept": {}, "attributes": {"a": {"b": {"c": 1}}}}, "number"),
    ],
)
def test_fields_are_checked(fields, words):
    with pytest.raises(ValueError, match=words):
        Shrink(**fields)


def test_the_text_holds_the_contract_and_comes_back():
    recipe = Recipe([edit()])
    (written,) = json.loads(recipe.to_json())
    assert written["op"] == "shrink"
    assert written["version"] == 1
    assert written["kept"]["head.weight"] == {"1": KEPT}
    assert written["attributes"]["conv"] == {"out_channels": 4}
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)
    small, model = edit().apply(fresh()), replay(fresh(), again)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    hostile = '[{"op":"shrink","kept":{},"attributes":{"":{"forward":"os.system"}}}]'
    with pytest.raises(UntrustedInputError, match="forward"):
        Recipe.from_json(hostile)


def test_a_model_carries_its_recipe_and_copies_do_too():
    model = fresh()
    assert len(recipe_of(model)) == 0
    first = edit().apply(model) and edit()
    record(model, first)
    record(model, first)  # the same object again says nothing new
    assert recipe_of(model) == Recipe([first])
    assert not any("recipe" in name for name in model.state_dict())
    assert recipe_of(copy.deepcopy(model)) == recipe_of(model)
    assert recipe_of(replay(fresh(), recipe_of(model))) == recipe_of(model)
    record(model, edit())
    assert len(recipe_of(model)) == 2


def test_the_recipe_is_of_the_module_inside_a_compiled_one():
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    record(compiled, edit())
    assert len(recipe_of(model)) == len(recipe_of(compiled)) == 1
