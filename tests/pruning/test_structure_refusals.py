"""What cannot be proved is refused by name, and what the model's own code cannot follow shows in the check."""

import copy

import pytest
import torch
from structure_helpers import answer, check_exact, enliven, random_units, zeroed
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.pruning.structure import operation, trace
from lightning_opt.pruning.structure.calls import OPERATIONS, Value


class Net(nn.Module):
    def __init__(self, between, width=8):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(width, 3), between

    def forward(self, x):
        return self.b(self.between(torch.relu(self.a(x))))


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def reasons(structure, tensor="a.weight", dim=0):
    return [str(refusal) for refusal in structure.refused if (refusal.tensor, refusal.dim) == (tensor, dim)]


@pytest.mark.parametrize(
    ("between", "width", "why"),
    [
        (lambda x: x.softmax(-1), 8, "compared along (softmax in the model)"),
        (lambda x: x.sort(-1)[0], 8, "compared along (sort in the model)"),
        (lambda x: x.cumsum(-1), 8, "compared along (cumsum in the model)"),
        (lambda x: x[:, [0, 2, 4, 5, 1, 7, 3, 6]], 8, "picked by place (index in the model)"),
        (lambda x: x.unfold(-1, 4, 2).flatten(1), 12, "overlapping windows (unfold in the model)"),
        (lambda x: torch.flip(x, [-1]), 8, "moved along (flip in the model)"),
        (lambda x: x * torch.arange(8.0), 8, "counts positions (arange in the model)"),
        (lambda x: torch.logcumsumexp(x, -1), 8, "no rule (logcumsumexp in the model)"),
        (lambda x: (x[:, :, None] * x[:, None]).flatten(1), 64, "product of an axis with itself"),
        (lambda x: torch.cat([x[:, ::3], x[:, 3:]], 1), 8, "does not follow its parts (slice in the model)"),
    ],
)
def test_refused_by_name(between, width, why):
    structure = trace(Net(between, width), X, verify=False)
    assert not structure.groups
    assert any(why in reason for reason in reasons(structure)), reasons(structure)


def test_a_rule_that_does_not_know_the_form_refuses():
    @operation("special_entr")
    def _broken(call):
        return call.arguments["not there"]

    try:
        structure = trace(Net(lambda x: torch.special.entr(x)), X, verify=False)
    finally:
        del OPERATIONS["special_entr"]
    assert not structure.groups
    assert any("a form that its rule does not know (special_entr" in reason for reason in reasons(structure))


class Picking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).unflatten(-1, (3, -1))[:, [2, 0]].flatten(1))


def test_what_is_refused_of_an_axis_is_told_though_other_units_are_free():
    structure = trace(Picking(), X)
    assert [group.size for group in structure.groups] == [4]
    assert any("picked by place (index" in reason for reason in reasons(structure))


def test_inputs_and_outputs_stay():
    structure = trace(nn.Linear(6, 8), X, verify=False)
    assert not structure.groups
    assert {(r.tensor, r.dim): r.why for r in structure.refused} == {
        ("weight", 0): "is an axis of the model's outputs",
        ("weight", 1): "is an axis of the model's inputs",
        ("bias", 0): "is an axis of the model's outputs",
    }


class HardCoded(nn.Module):
    """Views with a number that no attribute holds."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x):
        y = torch.relu(self.a(x)).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        return self.c(torch.relu(self.b(y)))


def test_a_size_in_the_code_is_found_by_running_the_smaller_model():
    assert len(trace(HardCoded(), X, verify=False).groups) == 3
    structure = trace(HardCoded(), X)
    assert [group.name for group in structure.groups] == ["b"]
    assert any("the model's code fails" in reason for reason in reasons(structure))


class Silent(nn.Module):
    """A wrong size that raises nothing: the rest of a view swallows it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = torch.relu(self.b(torch.relu(self.a(x)))).view(len(x), 3, -1)
        return self.c(y.transpose(1, 2).softmax(1).flatten(1))


def test_a_shape_other_than_foretold_is_found_by_tracing_again():
    structure = trace(Silent(), torch.randn(2, 6))
    check = trace(Silent(), torch.randn(2, 6), verify=False)
    assert {group.size for group in check.groups} >= {3, 8}
    assert [group.size for group in structure.groups] == [8]
    assert any("no attribute holds" in reason or "code fails" in reason for reason in reasons(structure, "b.weight"))


class Blind(nn.Module):
    """Code that takes a number from a size: what is left is no longer what zeroing gives."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y / y.shape[-1])


def test_another_output_than_the_masked_model_is_found_by_comparing():
    assert [group.exact for group in trace(Blind(), X, verify=False).groups] == [True]
    structure = trace(Blind(), X)
    assert not structure.groups
    assert any("another output" in reason for reason in reasons(structure))


class Halves(nn.Module):
    """Parts that the code takes by half of the whole can only change together."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        first, second = torch.relu(self.a(x)).chunk(2, -1)
        return self.b(first) + self.c(second)


def test_parts_of_a_chunk_are_cut_together():
    structure = check_exact(Halves(), X, verify=True)
    assert [group.size for group in structure.groups] == [4]


def test_torch_attention_keeps_its_heads_and_says_so():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 3))
    x = torch.randn(2, 5, 6)
    structure = check_exact(model, x, verify=True)
    assert [group.name for group in structure.groups] == ["1.linear1"]
    assert any("self_attn" in reason for reason in reasons(structure, "1.self_attn.out_proj.weight", 1))


class Averaging(nn.Module):
    """A mean over channels: zeroed units count in it, units that are cut do not."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.b(y - y.mean(-1, keepdim=True))


def test_a_mean_over_units_is_not_exact():
    model = enliven(Averaging())
    (group,) = (structure := trace(model, X)).groups
    assert not group.exact
    assert "averaged" in group.inexact_because
    kept = random_units(structure, kinds=("hidden",))
    small = structure.edit(kept).apply(copy.deepcopy(model))
    assert (answer(small, X) - answer(zeroed(model, structure.masks(kept)), X)).abs().max() > 1e-3


class Cosine(nn.Module):
    """A product of two activations, both one at cut units."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x):
        return (self.a(x).cos()[:, None] @ self.b(x).cos()[:, :, None]).flatten(1)


def test_units_that_are_not_zero_when_their_weights_are_count_in_a_product():
    (group,) = trace(Cosine(), X).groups
    assert not group.exact
    assert "not zero" in group.inexact_because


def test_a_model_that_depends_on_its_data_names_the_operation():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match=r"Branching cannot be traced by torch.export.*") as failure:
        trace(Branching(), X)
    assert "\n" not in str(failure.value)


def test_a_rule_from_outside():
    assert trace(Net(lambda x: torch.special.entr(x)), X, verify=False).groups == ()

    @operation("special_entr")
    def _entropy(call):
        return Value(list(call["self"].axes), dirty=call["self"].dirty)

    try:
        check_exact(Net(lambda x: torch.special.entr(x)), X, verify=True)
    finally:
        del OPERATIONS["special_entr"]


def test_shared_weights_are_one_group():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 3))
    structure = check_exact(model, X, verify=True)
    assert [group.size for group in structure.groups] == [8]


def test_a_plain_tensor_that_no_recipe_can_name_freezes():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(6, 8), nn.Linear(8, 3), torch.arange(1.0, 9.0)

        def forward(self, x):
            return self.b(self.a(x) * self.scale)

    structure = trace(Scaled(), X)
    assert not structure.groups
    assert any("constant" in reason for reason in reasons(structure))
