"""What a structure says: kinds, names, sizes, costs, masks, refusals, and its edit as a recipe."""

import copy

import pytest
import torch
from structure_helpers import answer, check_exact, enliven, random_units, zeroed
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_opt import models
from lightning_opt.pruning.structure import Structure, trace
from lightning_opt.surgery import Recipe, replay


class Block(nn.Module):
    """A transformer block in plain torch: attention, a wide pair of layers, two norms, residuals."""

    def __init__(self, dim=12, heads=3, hidden=16):
        super().__init__()
        self.heads, self.head_dim, self.scaling = heads, dim // heads, (dim // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.wide, self.narrow = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        n, t, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(n, t, self.heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2)
        x = x + self.out(y.reshape(n, t, self.heads * self.head_dim))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.blocks, self.head = nn.Embedding(20, 12), nn.Sequential(Block(), Block()), nn.Linear(12, 5)

    def forward(self, ids):
        return self.head(self.blocks(self.table(ids)).mean(1))


IDS = torch.arange(10).view(2, 5)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return enliven(Transformer())


@pytest.fixture(scope="module")
def structure(transformer) -> Structure:
    return trace(transformer, IDS)


def test_kinds_and_names(structure):
    assert {group.name: (group.kind, group.size, group.exact) for group in structure.groups} == {
        "width": ("width", 12, False),
        "blocks.0 heads": ("heads", 3, True),
        "blocks.0.q head_dim": ("head_dim", 4, False),
        "blocks.0.wide": ("hidden", 16, True),
        "blocks.1 heads": ("heads", 3, True),
        "blocks.1.q head_dim": ("head_dim", 4, False),
        "blocks.1.wide": ("hidden", 16, True),
    }


def test_what_is_not_exact_says_why(structure):
    assert "norm" in structure["width"].inexact_because
    assert "scaling" in structure["blocks.0.q head_dim"].inexact_because


def test_cut_equals_zeroed(transformer):
    check_exact(copy.deepcopy(transformer), IDS)
    check_exact(copy.deepcopy(transformer), IDS, kinds=("heads",), share=0.34)


@pytest.mark.parametrize("kind", ["width", "head_dim"])
def test_inexact_kinds_run_and_carry_the_numbers_along(transformer, structure, kind):
    """The smaller model must be the model of the smaller constructor, given the same weights."""
    kept = random_units(structure, kinds=(kind,))
    small = structure.edit(kept).apply(copy.deepcopy(transformer))
    fresh = Transformer()
    for place, block in enumerate(fresh.blocks):
        fresh.blocks[place] = Block(dim=6, heads=3, hidden=16) if kind == "width" else block
    if kind == "head_dim":
        for block in small.blocks:
            assert (block.head_dim, block.scaling) == (2, 2**-0.5)
    else:
        assert {m.normalized_shape for m in small.modules() if isinstance(m, nn.LayerNorm)} == {(6,)}
        assert {block.head_dim for block in small.blocks} == {4}
    assert answer(small, IDS).shape == (2, 5)


def test_attributes_follow(transformer, structure):
    small = structure.edit({"blocks.0 heads": [0, 2], "blocks.1.wide": [3]}).apply(copy.deepcopy(transformer))
    first, second = small.blocks
    assert (first.heads, first.head_dim, first.q.out_features, first.out.in_features) == (2, 4, 8, 8)
    assert first.scaling == 0.5
    assert (second.heads, second.wide.out_features, second.narrow.in_features) == (3, 1, 1)


def test_wrong_units_give_another_answer(transformer, structure):
    """The control: the check does tell one choice of units from another."""
    kept = {"blocks.0.wide": [0, 1, 2, 3]}
    small = structure.edit(kept).apply(copy.deepcopy(transformer))
    other = zeroed(transformer, structure.masks({"blocks.0.wide": [0, 1, 2, 4]}))
    assert (answer(small, IDS) - answer(other, IDS)).abs().max() > 1e-3


def test_flops_and_parameters_are_those_of_the_model(transformer, structure):
    def count(model):
        # The counter knows the products of attention, but not the fused kernel for CPUs.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(IDS)
        return counter.get_total_flops()

    assert structure.flops() == count(transformer)
    kept = random_units(structure)
    small = structure.edit(kept).apply(copy.deepcopy(transformer))
    assert structure.flops(kept) == count(small)
    assert structure.parameters(kept) == sum(parameter.numel() for parameter in small.parameters())


def test_costs_of_one_unit(structure):
    group = structure["blocks.0.wide"]
    without = {group.name: list(range(group.size - 1))}
    assert group.params_per_unit == structure.parameters() - structure.parameters(without) == 12 + 1 + 12
    assert group.flops_per_unit == structure.flops() - structure.flops(without) == 2 * 10 * (12 + 12)
    heads = structure["blocks.0 heads"]
    without = {heads.name: [0, 1]}
    assert heads.params_per_unit == structure.parameters() - structure.parameters(without)
    assert heads.flops_per_unit == structure.flops() - structure.flops(without)


def test_unit_slices_name_every_entry_of_a_unit(structure):
    members = {(m.tensor, m.dim): m.indices for m in structure.unit_slices("blocks.0 heads")}
    assert set(members) == {
        *((f"blocks.0.{name}.{leaf}", 0) for name in "qkv" for leaf in ("weight", "bias")),
        ("blocks.0.out.weight", 1),
    }
    assert members["blocks.0.q.weight", 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_masks_are_the_cut(structure):
    masks = structure.masks({"blocks.0.wide": [1, 5]})
    assert masks["blocks.0.wide.bias"].nonzero().flatten().tolist() == [1, 5]
    assert masks["blocks.0.narrow.weight"].all(0).nonzero().flatten().tolist() == [1, 5]
    assert set(masks) == {"blocks.0.wide.weight", "blocks.0.wide.bias", "blocks.0.narrow.weight"}


def test_refused_axes_name_tensor_and_operation(structure):
    found = {(refusal.tensor, refusal.dim): refusal for refusal in structure.refused}
    assert set(found) == {("table.weight", 0), ("head.weight", 0), ("head.bias", 0)}
    assert "output" in found["head.weight", 0].why
    assert "embedding" in found["table.weight", 0].operation
    assert str(found["table.weight", 0]).startswith("table.weight dim 0 holds rows")


def test_ignore(transformer):
    names = [group.name for group in trace(transformer, IDS, ignore=["blocks.1", "*.narrow.*"], verify=False).groups]
    assert names == ["blocks.0 heads", "blocks.0.q head_dim"]
    with pytest.raises(ValueError, match=r"'blocks.7' matches no parameter"):
        trace(transformer, IDS, ignore=["blocks.7"], verify=False)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"blocks.0.wide": []}, "'blocks.0.wide' would be emptied"),
        ({"blocks.0.wide": [16]}, "'blocks.0.wide' has units 0 to 15"),
        ({"blocks.0.wide": [1, 1]}, "each once"),
        ({"blocks.9.wide": [1]}, "'blocks.9.wide' is not known"),
    ],
)
def test_bad_choices(structure, kept, message):
    with pytest.raises(ValueError, match=message):
        structure.edit(kept)


def test_the_edit_is_a_recipe(transformer, structure):
    edit = structure.edit(random_units(structure))
    recipe = Recipe.from_json(Recipe([edit]).to_json())
    small = edit.apply(copy.deepcopy(transformer))
    fresh = replay(Transformer(), recipe)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(answer(fresh, IDS), answer(small, IDS))


def test_the_model_is_left_as_it_was(transformer):
    model = copy.deepcopy(transformer).train()
    model.blocks[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, IDS)
    assert [module.training for module in model.blocks] == [False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(type(block.heads) is int for block in model.blocks)
    assert not model.blocks[0]._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_names_are_stable(transformer, structure):
    again = trace(copy.deepcopy(transformer), IDS, verify=False)
    assert [(g.name, g.size, g.kind) for g in again.groups] == [(g.name, g.size, g.kind) for g in structure.groups]


def test_a_second_cut_after_the_first(transformer, structure):
    small = structure.edit({"blocks.0 heads": [1, 2], "width": list(range(8))}).apply(copy.deepcopy(transformer))
    again = trace(small, IDS)
    assert (again["blocks.0 heads"].size, again["width"].size, again["blocks.1 heads"].size) == (2, 8, 3)
    smaller = again.edit({"blocks.0 heads": [0]}).apply(copy.deepcopy(small))
    masked = zeroed(small, again.masks({"blocks.0 heads": [0]}))
    assert torch.allclose(answer(smaller, IDS), answer(masked, IDS), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: models.ConvNet(num_outputs=10), torch.randn(2, 1, 28, 28)),
        (lambda: models.CifarResNet(num_outputs=10, depth=8), torch.randn(2, 3, 16, 16)),
        (lambda: models.ViT(num_outputs=10, image_size=8, depth=1, dim=16, fused_qkv=True), torch.randn(2, 3, 8, 8)),
        (lambda: models.GPT(vocab_size=20, context_length=8, dim=16, depth=1), torch.arange(16).view(2, 8)),
    ],
    ids=["cnn", "resnet", "vit", "gpt"],
)
def test_models_of_the_package(build, inputs):
    torch.manual_seed(0)
    check_exact(build(), inputs, share=0.25)


def test_a_compiled_model_is_traced_as_it_is(transformer):
    compiled = torch.compile(copy.deepcopy(transformer), backend="eager")
    structure = trace(compiled, IDS)
    kept = {"_orig_mod.blocks.0.wide": [1, 2]}
    masked = zeroed(transformer, {name[10:]: mask for name, mask in structure.masks(kept).items()})
    structure.edit(kept).apply(compiled)
    assert torch.allclose(answer(compiled, IDS), answer(masked, IDS), atol=1e-5)
