"""A recipe is data: it is written canonically, read with suspicion, and replayed to the same structure."""

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_opt.errors import LightningOptError, UntrustedInputError
from lightning_opt.surgery import DropLayers, Edit, Recipe, replay


class Deep(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))

    def forward(self, x):
        for layer in self.encoder.layer:
            x = torch.tanh(layer(x))
        return x


DROP = {"op": "drop_layers", "version": 1, "path": "encoder.layer", "kept": [0, 2, 4]}


def test_the_text_is_canonical_json_and_comes_back():
    recipe = Recipe([DROP]).append(DropLayers(path="encoder.layer", kept=(0,)))
    text = recipe.to_json()
    assert json.loads(text) == [DROP, {**DROP, "kept": [0]}]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert Recipe.from_json(text) == recipe
    assert Recipe.from_json(text).to_json() == text
    assert Recipe.from_json("[]") == Recipe()


def test_a_recipe_never_changes():
    recipe = Recipe([DROP])
    longer = recipe.append(DROP)
    assert (len(recipe), len(longer)) == (1, 2)
    assert recipe != longer
    assert hash(Recipe([DROP])) == hash(recipe)
    assert [edit.op for edit in longer] == ["drop_layers"] * 2
    with pytest.raises(AttributeError):
        recipe.edits = ()


def test_replay_keeps_the_named_layers_in_their_order():
    torch.manual_seed(0)
    model = Deep()
    layers, x = list(model.encoder.layer), torch.randn(2, 3)
    expected = x
    for place in (0, 2, 4):
        expected = torch.tanh(layers[place](expected))
    assert replay(model, Recipe([DROP])) is model
    assert torch.equal(model(x), expected)
    assert [name for name, _ in model.encoder.layer.named_children()] == ["0", "1", "2"]


def test_an_empty_recipe_replays_to_the_same_model():
    model = Deep()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert replay(model, Recipe()) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(model.state_dict()) == len(before)


def test_named_layers_keep_their_names():
    model = nn.Sequential(OrderedDict(first=nn.Linear(2, 2), act=nn.ReLU(), last=nn.Linear(2, 1)))
    replay(model, Recipe([{"op": "drop_layers", "path": "", "kept": [0, 2]}]))
    assert [name for name, _ in model.named_children()] == ["first", "last"]


@pytest.mark.parametrize(
    "edit",
    [
        {**DROP, "kept": [0, 9]},
        {**DROP, "path": "decoder.layer"},
        {**DROP, "path": "encoder"},
    ],
)
def test_an_edit_that_does_not_fit_is_named_by_number_and_changes_nothing(edit):
    model = Deep()
    with pytest.raises((ValueError, LightningOptError), match="edit 1 "):
        replay(model, Recipe([{**DROP, "kept": [0, 1, 2]}, edit]))
    assert len(model.encoder.layer) == 3


@pytest.mark.parametrize(
    "edit",
    [
        {"op": "os.system", "version": 1},
        {"version": 1},
        "drop_layers",
        7,
        {**DROP, "version": 2},
        {**DROP, "version": True},
        {**DROP, "kept": []},
        {**DROP, "kept": [2, 1]},
        {**DROP, "kept": [1, 1]},
        {**DROP, "kept": [-1, 0]},
        {**DROP, "kept": [0.0]},
        {**DROP, "kept": [True]},
        {**DROP, "kept": "0"},
        {**DROP, "path": 3},
        {**DROP, "command": "rm"},
        {"op": "drop_layers", "version": 1, "kept": [0]},
    ],
)
def test_a_bad_edit_is_refused_by_number(edit):
    with pytest.raises(LightningOptError, match="edit 1") as caught:
        Recipe.from_json(json.dumps([DROP, edit]))
    assert caught.value.exit_code in (2, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", "null", "[", '[{"op": NaN}]', "[" * 100_000, "[0]" * 2])
def test_what_is_no_list_of_edits_is_refused(text):
    with pytest.raises(UntrustedInputError):
        Recipe.from_json(text)


def test_a_recipe_that_is_too_long_is_refused(monkeypatch):
    from lightning_opt.surgery import recipe

    monkeypatch.setattr(recipe, "MAX_RECIPE_CHARACTERS", 50)
    with pytest.raises(UntrustedInputError, match="50"):
        Recipe.from_json(json.dumps([DROP]))


def test_a_new_edit_is_found_without_a_registry():
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Zero(Edit):
        op: ClassVar[str] = "test_zero"
        name: str

        def apply(self, model):
            nn.init.zeros_(model.get_parameter(self.name))
            return model

    recipe = Recipe.from_json('[{"op": "test_zero", "version": 1, "name": "encoder.layer.0.weight"}]')
    model = replay(Deep(), recipe)
    assert not model.encoder.layer[0].weight.any()
    assert model.encoder.layer[1].weight.any()
