"""Where networks are cut, that the parts together are the network, and what is refused."""

import itertools
import random

import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import logits_of, predict
from lightning_opt.models.cnn import ConvNet
from lightning_opt.models.gpt import GPT
from lightning_opt.models.mlp import MLP
from lightning_opt.models.resnet import ResNet
from lightning_opt.models.text import TextEncoder
from lightning_opt.models.vit import ViT
from lightning_opt.strategies.pipeline import PipelineStrategy, keep_only, split
from lightning_opt.strategies.pipeline.costs import balanced

IDS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


def images(size=16, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def ours():
    yield MLP(in_features=8, hidden=(16, 16, 16), num_outputs=3), torch.ones(2, 8)
    yield ConvNet(num_outputs=3, widths=(8, 16, 32)), images(channels=1)
    yield ResNet(num_outputs=3, small_images=True), images(8)
    yield ViT(num_outputs=3, image_size=16, patch_size=4, dim=16, depth=4, heads=2), images()
    yield TextEncoder(num_outputs=3, vocab_size=50, dim=16, depth=4, heads=2, max_length=16), PADDED
    yield GPT(vocab_size=50, dim=16, depth=4, heads=2, context_length=16), IDS


def hugging_face():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(**sizes, num_hidden_layers=4)
    yield transformers.BertForSequenceClassification(bert), PADDED
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=4, n_head=2, **tokens)
    yield transformers.GPT2LMHeadModel(gpt2), PADDED  # head and embedding are one tensor
    llama = transformers.LlamaConfig(**sizes, num_hidden_layers=4, num_key_value_heads=1)
    yield transformers.LlamaForCausalLM(llama), PADDED  # rotary positions pass by all layers
    shared = transformers.AlbertConfig(**sizes, num_hidden_layers=4, embedding_size=8)
    yield transformers.AlbertForSequenceClassification(shared), PADDED  # one layer that runs four times


def gradients_of(said, parameters):
    grads = torch.autograd.grad(logits_of(said).square().sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def check(model, inputs, stages):
    model.eval()
    whole = predict(model, inputs)
    wanted = gradients_of(whole, list(model.parameters()))
    found = split(model, inputs, stages, costs="parameters")
    assert len(found) == stages
    assert all(stage.parameters for stage in found)
    said = None
    for stage in found:
        said = stage(said, inputs)
    assert torch.equal(logits_of(said), whole), type(model).__name__
    for grad, want in zip(gradients_of(said, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(grad, want)
    held = set().union(*(stage.parameters for stage in found))
    assert held == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found[0].network.release()
    assert torch.equal(predict(model, inputs), whole)


def test_stages_one_after_the_other_are_the_network_for_our_models():
    torch.manual_seed(0)
    for model, inputs in ours():
        check(model, inputs, 4)


def test_stages_one_after_the_other_are_the_network_for_hugging_face():
    torch.manual_seed(0)
    for model, inputs in hugging_face():
        check(model, inputs, 3)


def test_a_stage_runs_on_other_sizes_with_its_own_tensors_alone():
    torch.manual_seed(0)
    model = GPT(vocab_size=50, dim=16, depth=4, heads=2, context_length=16).eval()
    ids = torch.randint(50, (3, 11))
    whole = model(ids)
    stages = split(model, IDS, 2, names=["blocks.2"])
    assert "blocks.0.attention.out.weight" in stages[0].parameters
    assert "blocks.2.attention.out.weight" not in stages[0].parameters
    between = stages[0](None, ids)
    dropped = keep_only(model, [stages[1]], device=torch.device("cpu"))
    assert torch.equal(stages[1](between, ids), whole)
    kept = dict(model.named_parameters())
    # the table is the head, and the first blocks take no memory
    assert "token_embedding.weight" in kept
    assert not any(name.startswith(("blocks.0", "blocks.1", "position")) for name in kept)
    assert dropped.like("blocks.0.attention.out.weight").untyped_storage().nbytes() == 4


def test_parts_cost_as_evenly_as_parts_can():
    draw = random.Random(0)
    for _ in range(60):
        costs = [draw.randint(1, 9) for _ in range(draw.randint(3, 8))]
        parts = draw.randint(1, 3)
        ends = [(0, *cuts, len(costs)) for cuts in itertools.combinations(range(1, len(costs)), parts - 1)]
        best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(one)) for one in ends)
        found = [0, *balanced(costs, parts), len(costs)]
        assert len(found) == parts + 1
        assert max(sum(costs[a:b]) for a, b in itertools.pairwise(found)) == best


class Crossing(nn.Module):
    """Each layer needs what the first two said."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        a, b = self.a(x).sin(), self.b(x).cos()
        c = self.c(a * b).tanh()
        return self.d(a + b * c) * a


def test_a_network_with_several_tensors_between_its_layers_is_refused_with_the_places_there_are():
    with pytest.raises(ConfigError, match=r"Crossing cannot be cut into 4 stages.*it can be cut before") as error:
        split(Crossing(), torch.ones(2, 4), 4)
    assert "strategy.stages" in str(error.value)


def test_a_named_cut_that_cannot_be_is_refused_with_those_that_can():
    model = Crossing()
    with pytest.raises(ConfigError, match=r"cannot be cut before 'd'.*more than one tensor"):
        split(model, torch.ones(2, 4), 2, names=["d"])
    with pytest.raises(ConfigError, match=r"'layerz.1' is no module.*near names: layers.1"):
        split(MLP(in_features=8, num_outputs=3), torch.ones(2, 8), 2, names=["layerz.1"])
    with pytest.raises(ConfigError, match=r"strategy\.split names 1 modules; 3 stages need 2"):
        split(MLP(in_features=8, num_outputs=3), torch.ones(2, 8), 3, names=["layers.1"])


@pytest.mark.parametrize(
    ("options", "processes", "words"),
    [
        ({"data_parallel_size": 3}, 4, "strategy.data_parallel_size=3 does not divide the 4 processes"),
        ({}, 1, "trainer.devices=2"),
        ({"stages": 3}, 2, "strategy.stages=3 is no multiple of the 2 processes"),
        ({"stages": 4}, 2, "interleaved_1f1b takes more"),
        ({"stages": 2, "schedule": "zbv"}, 2, "strategy.schedule=zbv takes 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_process_starts(options, processes, words):
    with pytest.raises(ConfigError, match=words):
        PipelineStrategy(**options).check_world(processes)


def test_a_model_is_checked_before_any_process_starts():
    PipelineStrategy().check_model(MLP(in_features=8, num_outputs=3), torch.ones(2, 8), processes=2)
    with pytest.raises(ConfigError, match="cannot be cut into 8 stages"):
        PipelineStrategy().check_model(MLP(in_features=8, num_outputs=3), torch.ones(2, 8), processes=8)


@pytest.mark.parametrize("wrong", [{"micro_batches": 0}, {"schedule": "eager"}, {"costs": "guessed"}])
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PipelineStrategy(**wrong)
