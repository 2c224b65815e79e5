import abc
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from layer_helpers import ACTIVATION, IDS, TiedNet, insert, shake, tied_edit, trained, weight_grid
from torch import nn
from torch.nn.utils import prune

from lightning_opt.quantization.convert import convert
from lightning_opt.quantization.edits import QuantizeEdit
from lightning_opt.quantization.layers import LayerKind, LayerPlan, handler, refusal
from lightning_opt.quantization.layers.swap import add_behaviour, plain_class, remove_behaviour, replace_behaviour
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.state import set_enabled


@pytest.mark.parametrize("values", [{}, {"learnable": True}])
def test_switched_off_nothing_changes_but_the_names_that_are_new(values):
    torch.manual_seed(0)
    model = shake(TiedNet()).eval()
    expected, names = model(IDS), list(model.state_dict())
    before = dict(model.named_parameters(remove_duplicate=False))
    insert(model, tied_edit(**values))
    assert torch.equal(model(IDS), expected)
    added = set(model.state_dict()) - set(names)
    assert set(names) <= set(model.state_dict())
    assert all("quantizer" in name for name in added)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert isinstance(model.conv, nn.Conv1d)
    assert isinstance(model.norm, nn.BatchNorm1d)


def test_switched_off_training_is_that_of_the_float_model():
    torch.manual_seed(0)
    model = shake(TiedNet()).train()
    twin = insert(copy.deepcopy(model), tied_edit())
    for each in (model, twin):
        each(IDS).square().mean().backward()
    assert torch.equal(model.conv.weight.grad, twin.conv.weight.grad)
    assert torch.equal(model.norm.running_var, twin.norm.running_var)
    assert all(not q.fitted.item() for q in twin.modules() if isinstance(q, FakeQuantizer)), "nothing has looked"


def test_switched_off_no_quantizer_is_called(monkeypatch):
    model = insert(TiedNet().eval(), tied_edit())
    monkeypatch.setattr(FakeQuantizer, "forward", lambda *_: pytest.fail("a quantizer ran"))
    model(IDS)
    set_enabled(model, True)
    with pytest.raises(pytest.fail.Exception):
        model(IDS)


def test_rounded_values_lie_on_the_grid():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(5, 3, bias=False))
    insert(layer, QuantizeEdit({"0": LayerPlan(weight=weight_grid(4))}))
    x = torch.eye(5)
    answer = trained(layer, x, steps=0)(x)
    weight = layer[0].weight.detach().double().numpy().T  # with unit inputs the answer is the weight itself
    scale = abs(weight).max(0) / 7
    expected = (weight / scale).round().clip(-7, 7) * scale
    torch.testing.assert_close(answer.detach().double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stage", ["off", "on", "converted"])
def test_a_model_is_copied_and_pickled(stage):
    torch.manual_seed(0)
    model = insert(shake(TiedNet()), tied_edit(4)).eval()
    if stage != "off":
        trained(model, IDS)
    if stage == "converted":
        convert(model)
    expected = model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert torch.equal(other(IDS), expected)
        assert type(other.conv) is type(model.conv)
    copied = copy.deepcopy(model)
    if stage == "on":
        assert copied.conv.norm is copied.norm
        assert copied.norm.layers[0] is copied.conv
        assert copied.head.weight_quantizer is copied.table.weight_quantizer


def test_a_copied_conv_does_not_hold_on_to_the_first_model():
    model = insert(TiedNet(), tied_edit())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.norm.running_var.fill_(9.0)
    set_enabled(model.eval(), True)
    assert not torch.equal(model.conv.deployed_weight()[0], copied.conv.deployed_weight()[0])


def test_state_loads_as_plain_tensors():
    torch.manual_seed(0)
    model = trained(insert(TiedNet(), tied_edit(4)), IDS)
    expected = model(IDS)
    for each in (model, convert(copy.deepcopy(model))):
        file = io.BytesIO()
        torch.save(each.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for tensor in each.state_dict().values():
                tensor.zero_()
        each.load_state_dict(state)
        assert torch.equal(each(IDS), expected)


def test_a_pickle_is_read_by_a_process_that_has_made_no_class_yet(tmp_path):
    model = trained(insert(nn.Sequential(nn.Linear(4, 3)), QuantizeEdit({"0": LayerPlan(weight=weight_grid())})), X)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch\n"
        f"model = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
        "print(type(model[0]).__name__, float(model(torch.ones(1, 4)).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, value = done.stdout.split()
    assert name == "QuantizedLinear"
    assert float(value) == pytest.approx(float(model(torch.ones(1, 4)).sum().detach()))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


class First(nn.Module):
    def forward(self, x):
        return super().forward(x) + 1


class Third(nn.Module):
    def forward(self, x):
        return super().forward(x) + 2


class Second(nn.Module):
    def forward(self, x):
        return super().forward(x) * 10


def test_behaviours_lie_on_top_of_each_other_and_come_off_again():
    layer = nn.Identity()
    add_behaviour(layer, First)
    add_behaviour(layer, Second)
    add_behaviour(layer, First)
    assert layer(torch.ones(())) == 20
    assert plain_class(layer) is nn.Identity
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    replace_behaviour(layer, First, Third)
    assert layer(torch.ones(())) == 30, "the third is where the first was, beneath the second"
    remove_behaviour(layer, First)
    remove_behaviour(layer, Second)
    remove_behaviour(layer, Third)
    assert type(layer) is nn.Identity


def test_classes_are_made_once_and_keep_the_type_of_abstract_ones():
    class Abstract(nn.Linear, abc.ABC):
        pass

    layers = [nn.Linear(2, 2), nn.Linear(2, 2), Abstract(2, 2)]
    for layer in layers:
        add_behaviour(layer, First)
    assert type(layers[0]) is type(layers[1])
    assert isinstance(type(layers[2]), abc.ABCMeta)
    assert isinstance(layers[2], Abstract)


class Scaled(nn.Module):
    """A user's own layer: it scales each feature, then adds up pairs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, x, *, double=False):
        y = x @ self.weight + self.bias
        return y * 2 if double else y


def test_a_layer_from_outside_is_quantized_once_it_has_a_handler():
    assert "register a handler" in refusal(Scaled())
    with pytest.raises(ValueError, match=r"'0' \(Scaled\) cannot be quantized: .*register a handler"):
        QuantizeEdit({"0": LayerPlan(weight=weight_grid())}).apply(nn.Sequential(Scaled()))

    def compute(module, x, weight, bias, *, double=False):
        y = x @ weight + bias
        return y * 2 if double else y

    @handler.register
    def _(module: Scaled):
        return LayerKind(name="scaled", layer=Scaled, compute=compute, axis=1)

    try:
        torch.manual_seed(0)
        model = nn.Sequential(Scaled())
        insert(model, QuantizeEdit({"0": LayerPlan(weight=weight_grid(3), output=ACTIVATION)}))
        trained(model, X)
        assert model[0].weight_quantizer.scale.numel() == 2, "one scale for each output"
        expected = model[0](X, double=True)
        convert(model)
        assert torch.equal(model[0](X, double=True), expected)
        assert "weight" not in dict(model[0].named_parameters())
    finally:
        handler.register(Scaled, lambda module: None)


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class NoForward(nn.Linear):
    pass


def _changed(change):
    layer = nn.Linear(3, 3)
    change(layer)
    return layer


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (OwnForward(3, 3), "forward of its own"),
        (nn.LazyLinear(3), "not yet initialised"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
        (nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), "no parameter of its own"),
        (_changed(lambda layer: prune.random_unstructured(layer, "weight", 0.5)), "no parameter of its own"),
        (_changed(lambda layer: vars(layer).update(forward=lambda x: x)), "forward of its own"),
        (nn.LSTM(3, 3), "no kind of layer"),
    ],
)
def test_layers_that_cannot_be_quantized_say_why(layer, word):
    assert word in refusal(layer)
    with pytest.raises(ValueError, match=f"layers: '0' .*{word}"):
        QuantizeEdit({"0": LayerPlan(weight=weight_grid())}).apply(nn.Sequential(layer))


def test_a_subclass_without_a_forward_of_its_own_is_quantized():
    model = nn.Sequential(NoForward(4, 3))
    insert(model, QuantizeEdit({"0": LayerPlan(weight=weight_grid())}))
    assert isinstance(model[0], NoForward)
    assert torch.equal(convert(trained(model, X))(X), model(X))
