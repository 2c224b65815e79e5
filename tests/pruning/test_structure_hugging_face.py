"""Hugging Face models from tiny random configurations, with both ways to compute attention."""

import copy

import pytest
import torch
from structure_helpers import answer, check_exact, enliven

from lightning_opt.pruning.structure import trace

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 30}
IDS = {"input_ids": torch.arange(14).view(2, 7)}


def bert(attention):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=16, attn_implementation=attention)
    return transformers.BertForSequenceClassification(config)


def gpt2(attention):
    config = transformers.GPT2Config(
        n_embd=16, n_head=4, n_layer=1, vocab_size=30, n_positions=16, attn_implementation=attention
    )
    return transformers.GPT2LMHeadModel(config)


def llama(attention):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_cut_equals_zeroed(build, attention):
    structure = check_exact(build(attention), IDS, verify=attention == "eager")
    kinds = {group.kind for group in structure.groups}
    assert kinds == {"width", "heads", "head_dim", "hidden"} | ({"queries"} if build is llama else set())


def test_bert_numbers():
    model = enliven(bert("sdpa"))
    structure = trace(model, IDS, verify=False)
    small = structure.edit({"bert.encoder.layer.0.attention heads": [0, 3, 2]}).apply(copy.deepcopy(model))
    attention = small.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (3, 4, 12)
    assert attention.query.out_features == 12
    assert attention.scaling == 0.5


def test_gpt2_numbers():
    model = enliven(gpt2("sdpa"))
    structure = trace(model, IDS, verify=False)
    small = structure.edit({"transformer.h.0.attn heads": [1]}).apply(copy.deepcopy(model))
    attention = small.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf, attention.head_dim) == (1, 4, 12, 4)


def test_llama_numbers():
    model = enliven(llama("eager"))
    structure = trace(model, IDS, verify=False)
    assert (structure["model.layers.0.self_attn heads"].size, structure["model.layers.0.self_attn queries"].size) == (
        2,
        2,
    )
    kept = {"model.layers.0.self_attn heads": [1], "model.layers.0.self_attn queries": [0]}
    small = structure.edit(kept).apply(copy.deepcopy(model))
    attention = small.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.num_key_value_groups) == (4, 4, 1)
    assert answer(small, IDS).shape == (2, 7, 30)


def test_llama_width_and_head_dim_run_and_pairs_of_the_rotation_go_together():
    model = enliven(llama("sdpa"))
    structure = trace(model, IDS)
    (head_dim,) = [group for group in structure.groups if group.kind == "head_dim"]
    assert head_dim.size == 2
    assert "model.rotary_emb.inv_freq" in {member.tensor for member in head_dim.members}
    width = next(group for group in structure.groups if group.kind == "width")
    small = structure.edit({head_dim.name: [1], width.name: list(range(0, 16, 2))}).apply(copy.deepcopy(model))
    assert small.model.layers[0].self_attn.head_dim == 2
    assert small.model.layers[0].self_attn.scaling == 2**-0.5
    assert answer(small, IDS).shape == (2, 7, 30)


def test_tied_embeddings_are_cut_once():
    model = enliven(gpt2("sdpa"))
    structure = trace(model, IDS, verify=False)
    (width,) = [group for group in structure.groups if group.kind == "width"]
    small = structure.edit({width.name: list(range(8))}).apply(copy.deepcopy(model))
    assert small.lm_head.weight is small.transformer.wte.weight
    assert small.lm_head.weight.shape == (30, 8)
    assert (small.lm_head.in_features, small.transformer.wte.embedding_dim) == (8, 8)


def test_the_cache_setting_is_put_back():
    model = llama("sdpa")
    assert model.config.use_cache is True
    trace(model, IDS, verify=False)
    assert model.config.use_cache is True
