"""The record of a forward: values, functions, modules; and that nothing in the model changes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_opt.quantization.calls import CallGraph, record_calls
from lightning_opt.quantization.placement_names import NAME_OF, common_name, is_in_place


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.layer(x))
        y += shift
        functional.relu(y, inplace=True)
        z = self.layer(self.dropout(y).T)
        return z, y


@pytest.fixture
def graph() -> CallGraph:
    return record_calls(Twice(), {"x": torch.randn(4, 4), "shift": torch.ones(4)})


def test_functions_in_order_with_one_name_for_all_spellings(graph: CallGraph) -> None:
    names = [(call.function, graph.path_of(call)) for call in graph.calls]
    assert names == [
        ("linear", "layer"),
        ("batch_norm", "norm"),
        ("add", ""),
        ("relu", ""),
        ("dropout", "dropout"),
        ("T", ""),
        ("linear", "layer"),
    ]
    assert [call.in_place for call in graph.calls] == [False, False, True, True, False, False, False]


def test_a_value_that_is_changed_in_place_is_a_new_one(graph: CallGraph) -> None:
    norm, add, relu, _, transpose, _ = graph.calls[1:]
    assert add.inputs[0] == norm.outputs[0] != add.outputs[0]
    assert relu.inputs == add.outputs
    assert relu.outputs != relu.inputs
    assert transpose.inputs == relu.outputs


def test_what_shares_memory_with_what_is_changed_is_new_as_well() -> None:
    class Sliced(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0] = 0
            row = y[0]
            y.add_(1)
            return row + 1

    graph = record_calls(Sliced(), torch.randn(2, 3))
    calls = {call.function: call for call in graph.calls}
    last = graph.calls[-1]
    assert calls["setitem"].outputs != calls["mul"].outputs
    assert last.inputs != calls["getitem"].outputs
    assert graph.values[last.inputs[0]].call == graph.calls[-2].number


def test_values_know_where_they_come_from(graph: CallGraph) -> None:
    linear = graph.calls[0]
    sources = [(graph.values[value].source, graph.values[value].name) for value in linear.inputs]
    assert sources == [("input", ""), ("parameter", "layer.weight"), ("parameter", "layer.bias")]
    assert graph.values[linear.outputs[0]].shape == (4, 4)
    assert {graph.values[value].name for value in graph.calls[1].inputs if graph.values[value].source == "buffer"} == {
        "norm.running_mean",
        "norm.running_var",
    }


def test_runs_hold_what_modules_are_given_and_return(graph: CallGraph) -> None:
    assert [run.path for run in graph.runs] == ["", "layer", "norm", "dropout", "layer"]
    assert [run.parent for run in graph.runs] == [None, 0, 0, 0, 0]
    assert graph.runs[0].is_tuple
    assert graph.runs[0].returned == (graph.calls[-1].outputs[0], graph.calls[3].outputs[0])
    assert graph.runs[1].given == (graph.calls[0].inputs[0],)
    assert (graph.runs[4].start, graph.runs[4].end) == (6, 7)
    assert len(graph.runs_of("layer")) == 2


def test_the_model_is_left_as_it_was() -> None:
    model = Twice().train()
    model.norm.eval()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    for training in (False, True):
        record_calls(model, {"x": torch.randn(4, 4), "shift": torch.ones(4)}, training=training)
    torch.set_rng_state(state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.state_dict().items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_random_numbers_are_not_used_up() -> None:
    x = {"x": torch.randn(4, 4), "shift": torch.ones(4)}
    torch.manual_seed(3)
    record_calls(Twice(), x, training=True)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    model = Twice()
    torch.manual_seed(4)
    record_calls(model, x, training=True)
    assert torch.equal(torch.rand(3), expected)


def test_training_shows_the_way_that_is_taken_in_training() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if self.training else x * 2

    assert [call.function for call in record_calls(Branches(), torch.ones(1)).calls] == ["mul"]
    assert [call.function for call in record_calls(Branches(), torch.ones(1), training=True).calls] == ["add"]


def test_layers_of_an_encoder_are_called_one_by_one() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    paths = {run.path for run in record_calls(layer.eval(), torch.randn(2, 3, 8)).runs}
    assert {"linear1", "linear2", "norm1"} <= paths
    assert torch.backends.mha.get_fastpath_enabled()


def test_hooks_go_when_the_model_fails() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    model = Fails()
    with pytest.raises(RuntimeError, match="no"):
        record_calls(model, torch.ones(1))
    assert not model._forward_hooks


class TestNames:
    @pytest.mark.parametrize(
        ("function", "name"),
        [
            (torch.add, "add"),
            (Tensor.add_, "add"),
            (Tensor.__iadd__, "add"),
            (functional.relu_, "relu"),
            (torch.concat, "cat"),
            (Tensor.__truediv__, "div"),
            (functional.gelu, "gelu"),
            (Tensor.clamp_min, "clamp"),
            (Tensor.softmax, "softmax"),
            (functional.scaled_dot_product_attention, "scaled_dot_product_attention"),
        ],
    )
    def test_of_functions(self, function: object, name: str) -> None:
        assert NAME_OF[function] == name
        assert common_name(function.__name__) in (name, common_name(name))

    def test_in_place(self) -> None:
        assert is_in_place(Tensor.add_)
        assert is_in_place(Tensor.__imul__)
        assert not is_in_place(Tensor.__init__)
        assert not is_in_place(torch.add)
