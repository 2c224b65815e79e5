"""Which layers to drop, and Hugging Face models that come back from `from_pretrained` after a shrink."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.pruning.depth import (
    angular_distances,
    drop_by_angular_distance,
    drop_by_loss,
    find_stack,
    keep_layers,
)
from lightning_opt.pruning.hugging_face import hugging_face_config, update_config
from lightning_opt.pruning.structured import shrink
from lightning_opt.surgery import DropLayers, Recipe, Shrink, replay


class Turn(nn.Module):
    """Turns every vector of a plane by an angle."""

    def __init__(self, degrees, place):
        super().__init__()
        angle = math.radians(degrees)
        turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        self.weight, self.layer_idx, self.degrees = nn.Parameter(torch.tensor(turn)), place, degrees

    def forward(self, hidden, mask=None):
        return (hidden @ self.weight.T, "more")


class Turns(nn.Module):
    def __init__(self, *degrees):
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(Turn(each, place) for place, each in enumerate(degrees))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, input_ids, attention_mask=None):
        for layer in self.body.layers:
            input_ids = layer(hidden=input_ids)[0]
        return input_ids


DEGREES = (40, 10, 5, 30, 20)
BATCHES = [torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(n)) for n in (2, 5)]


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("position", ["last", "all"])
def test_distances_are_angles(span, position):
    model = Turns(*DEGREES).train()
    found = angular_distances(model, BATCHES, span=span, position=position)
    expected = [sum(DEGREES[first : first + span]) / 180 for first in range(6 - span)]
    assert np.allclose(found, expected, atol=1e-4)
    assert model.training
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())


class Shift(nn.Module):
    """Changes only the token at one place."""

    def __init__(self, place):
        super().__init__()
        self.place, self.scale = place, nn.Parameter(torch.ones(()))

    def forward(self, hidden):
        hidden = hidden.clone()
        hidden[:, self.place] = hidden[:, self.place].flip(-1) * self.scale
        return hidden


class Shifts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Shift(1), Shift(2)])

    def forward(self, input_ids, attention_mask):
        for layer in self.layers:
            input_ids = layer(input_ids)
        return input_ids


def test_the_last_token_is_the_last_that_the_mask_lets_through():
    x = torch.tensor([[[1.0, 0.0]] * 3] * 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = angular_distances(Shifts(), [{"input_ids": x, "attention_mask": mask}])
    assert np.allclose(found, [0.25, 0.25])  # each turns one of the two last tokens by a right angle, which is a half
    everywhere = angular_distances(Shifts(), [{"input_ids": x, "attention_mask": mask}], position="all")
    assert np.allclose(everywhere, [2 / 5 / 2, 1 / 5 / 2])


def test_the_run_that_turns_least_is_dropped_and_layers_are_numbered_anew():
    model = Turns(*DEGREES)
    recipe = drop_by_angular_distance(model, BATCHES, drop=2)
    assert recipe.edits[0] == DropLayers("body.layers", (0, 3, 4))
    assert len(model.body.layers) == 5
    replay(model, Recipe.from_json(recipe.to_json()))
    assert [layer.degrees for layer in model.body.layers] == [40, 30, 20]
    assert [layer.layer_idx for layer in model.body.layers] == [0, 1, 2]


def test_layers_are_dropped_by_what_the_loss_says():
    degrees = (90, 5, -90, 40, -45)
    model = Turns(*degrees).train()
    target = [batch.flip(1).flip(1) for batch in BATCHES]
    judged = [(x, y) for x, y in zip(BATCHES, target, strict=True)]

    def loss(net, batch):
        return (net(batch[0]) - batch[1]).square().mean()

    def left(kept):
        return abs(sum(degrees[n] for n in kept))  # what is left to turn back

    recipe = drop_by_loss(model, judged, loss, drop=2)
    first = min(itertools.combinations(range(5), 4), key=left)
    second = min(itertools.combinations(first, 3), key=left)
    assert recipe.edits[0] == DropLayers("body.layers", second)
    assert [layer.degrees for layer in model.body.layers] == list(degrees)
    assert model.training


def test_the_stack_is_the_longest_run_of_one_class():
    assert find_stack(Turns(1, 2, 3)) == "body.layers"
    with pytest.raises(ValueError, match="path"):
        find_stack(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: angular_distances(m, []), "batches is empty"),
        (lambda m: angular_distances(m, BATCHES, span=5), "span"),
        (lambda m: angular_distances(m, BATCHES, path="body.lairs"), "body.lairs"),
        (lambda m: angular_distances(m, BATCHES, path="body"), "'body' is a Module"),
        (lambda m: angular_distances(m, BATCHES, path="head"), "'head' does not run"),
        (lambda m: drop_by_loss(m, [], None, drop=1), "batches is empty"),
        (lambda m: drop_by_loss(m, [1], None, drop=0), "drop"),
        (lambda m: keep_layers(m, [0, 7]), "layer 7"),
        (lambda m: angular_distances(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), BATCHES), "other shapes"),
    ],
)
def test_bad_requests(call, words):
    with pytest.raises(ValueError, match=words):
        call(Turns(*DEGREES))


transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 60, "max_position_embeddings": 16}
IDS = torch.randint(0, 60, (2, 7), generator=torch.Generator().manual_seed(0))


def bert():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, **SMALL
    )
    return transformers.BertForMaskedLM(config)


def llama(**options):
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        use_cache=False,
        **SMALL,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def qwen():
    options = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4}
    config = transformers.Qwen3Config(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=24,
        use_sliding_window=True,
        max_window_layers=3,
        **SMALL,
        **options,
    )
    return transformers.Qwen3ForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=4, n_positions=16, vocab_size=60, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


HALF = list(range(0, 24, 2))


def bert_hidden(model):
    dims = {"intermediate.dense.weight": 0, "intermediate.dense.bias": 0, "output.dense.weight": 1}
    return Shrink({f"bert.encoder.layer.{n}.{name}": {dim: HALF} for n in range(3) for name, dim in dims.items()})


def bert_heads(model):
    layer = "bert.encoder.layer.0.attention"
    dims = {f"{layer}.self.{name}.{what}": 0 for name in ("query", "key", "value") for what in ("weight", "bias")}
    attributes = {f"{layer}.self": {"num_attention_heads": 2, "all_head_size": 8}}
    return Shrink(
        {n: {dim: list(range(8))} for n, dim in {**dims, f"{layer}.output.dense.weight": 1}.items()}, attributes
    )


def llama_by_trace(model):
    return shrink(model, {"input_ids": IDS}, ratio=0.5, kinds=["hidden", "heads"])


def gpt2_hidden(model):
    dims = {"c_fc.weight": 1, "c_fc.bias": 0, "c_proj.weight": 0}
    half = list(range(32))
    layers = [f"transformer.h.{n}.mlp" for n in range(3)]
    kept = {f"{layer}.{name}": {dim: half} for layer in layers for name, dim in dims.items()}
    return Shrink(kept, {f"{layer}.c_fc": {"nf": 32} for layer in layers})


def smaller(model, cut, layers):
    edit = cut(model) if cut else None
    if isinstance(edit, Shrink):
        replay(model, Recipe([edit]))
    if layers:
        replay(model, keep_layers(model, layers))
    return model.eval()


@pytest.mark.parametrize(
    ("make", "cut", "layers", "changed"),
    [
        (bert, bert_hidden, [0, 2], {"intermediate_size": 12, "num_hidden_layers": 2}),
        (
            llama,
            llama_by_trace,
            [1, 2],
            {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2},
        ),
        (qwen, None, [0, 2], {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
        (gpt2, gpt2_hidden, [0, 1], {"n_inner": 32, "n_layer": 2}),
    ],
)
def test_from_pretrained_gives_back_the_shrunk_model(tmp_path, make, cut, layers, changed):
    torch.manual_seed(0)
    model = smaller(make(), cut, layers)
    found = hugging_face_config(model)
    assert found.changed == changed
    assert update_config(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in changed} == changed
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_where_no_configuration_fits_the_reason_is_said():
    torch.manual_seed(0)
    model = smaller(bert(), bert_heads, None)  # BERT has a head size of hidden size / heads
    found = hugging_face_config(model)
    assert found.values is None
    assert "attention" in found.reason
    assert "BertConfig" in found.reason
    before = model.config
    assert not update_config(model)
    assert model.config is before
    uneven = llama()
    kept = {
        f"model.layers.1.mlp.{name}_proj.weight": {dim: [0, 1]} for name, dim in (("gate", 0), ("up", 0), ("down", 1))
    }
    Shrink(kept).apply(uneven)
    assert "layers.1.mlp" in hugging_face_config(uneven).reason
    assert "no Hugging Face model" in hugging_face_config(nn.Linear(2, 2)).reason


def test_a_model_that_nothing_was_done_to_keeps_its_configuration():
    model = bert()
    found = hugging_face_config(nn.Sequential(model))
    assert found.changed == {}
    assert found.values == model.config.to_dict()
