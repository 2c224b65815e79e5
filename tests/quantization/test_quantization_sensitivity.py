import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy
from torch import nn

from lightning_opt.quantization.calibration import CalibrationError
from lightning_opt.quantization.sensitivity import QuantizedParts, distance_from, drop_of, sensitivity


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def data(n=96):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1))


def to_two_bits(weight):
    scale = weight.abs().amax(1, keepdim=True)
    return (weight / scale).round().clamp(-1, 1) * scale


def divergence_by_hand(model, x, weights):
    """Rebuild the network in numpy's hands with some weights rounded, and ask scipy how far its answers are."""
    with torch.no_grad():
        wanted = model(x).double().numpy()
        h = x
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                weight = to_two_bits(layer.weight) if name in weights else layer.weight
                h = nn.functional.linear(h, weight, layer.bias)
            else:
                h = layer(h)
    p, q = (np.exp(log_softmax(value, axis=1)) for value in (wanted, h.double().numpy()))
    return float(np.mean(entropy(p, q, axis=1)))


def test_each_layer_costs_what_it_costs_alone():
    model, x = net(), data()
    rows = sensitivity(model, x[:1], "w2", calibration=x.split(32))
    found = {row.name: row.cost for row in rows}
    wanted = {name: divergence_by_hand(model, x, {name}) for name in "024"}
    assert found == pytest.approx(wanted, rel=1e-4)
    assert [row.name for row in rows] == sorted(wanted, key=lambda name: -wanted[name])
    assert [(row.weight_bits, row.activation_bits) for row in rows] == [(2, None)] * 3
    assert {row.name: row.params for row in rows} == {"0": 128, "2": 256, "4": 64}


def test_all_but_one_says_what_a_layer_adds_to_the_others():
    model, x = net(), data()
    found = {row.name: row.cost for row in sensitivity(model, x[:1], "w2", calibration=[x], way="all_but")}
    whole = divergence_by_hand(model, x, set("024"))
    wanted = {name: whole - divergence_by_hand(model, x, set("024") - {name}) for name in "024"}
    assert found == pytest.approx(wanted, rel=1e-4)


def test_the_layer_that_cannot_be_rounded_comes_first():
    model, x = net(), data()
    with torch.no_grad():
        model[2].weight[:, 0] = 40.0  # on each row one weight that leaves the others nothing
        model[0].weight[0].zero_()
        model[0].bias[0] = 0.0
    assert sensitivity(model, x[:1], "w4a8", calibration=[x])[0].name == "2"


def test_activations_are_part_of_it():
    model, x = net(), data()
    x[0, 0] = 1e4  # leaves all other inputs of the first layer a single step
    judge = distance_from(model, [x[1:]])
    found, weights = (
        {row.name: row.cost for row in sensitivity(model, x[:1], scheme, calibration=[x], judge=judge)}
        for scheme in ("w8a8", "w8")
    )
    assert found["0"] > 100 * weights["0"]


def test_the_model_stays_as_it_is():
    model, x = net(), data()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sensitivity(model, x[:1], "w4a8", calibration=[x])
    assert model.training
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_excluded_layers_are_not_there():
    rows = sensitivity(net(), data()[:1], "w8", calibration=[data()], exclude=["4"])
    assert {row.name for row in rows} == {"0", "2"}


def test_a_metric_can_be_the_judge():
    judge = drop_of(lambda model: 0.75, reference=0.9)
    assert judge(nn.Identity()) == pytest.approx(0.15)
    assert drop_of(lambda model: 0.75, reference=0.5, higher_is_better=False)(nn.Identity()) == pytest.approx(0.25)
    model, x = net(), data()
    rows = sensitivity(model, x[:1], "w2", calibration=[x], judge=lambda other: (other(x) - model(x)).std().item())
    assert len(rows) == 3


def test_one_output_is_judged_by_its_squared_error():
    model, x = nn.Sequential(nn.Linear(8, 1)).eval(), data()
    other = nn.Sequential(nn.Linear(8, 1)).eval()
    wanted, found = model(x).detach().double().numpy(), other(x).detach().double().numpy()
    share = np.mean((wanted - found) ** 2) / np.var(wanted)
    assert distance_from(model, [x[:40], x[40:]])(other) == pytest.approx(share, rel=1e-6)


def test_switching_is_undone():
    model, x = net(), data()
    parts = QuantizedParts(model, x[:1], "w8a8", batches=[x])
    before = parts.model(x)
    with parts.only([]):
        assert torch.equal(parts.model(x), model(x))
    with parts.all_but(["2"]):
        assert not torch.equal(parts.model(x), before)
    assert torch.equal(parts.model(x), before)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'each'"):
        sensitivity(net(), data()[:1], "w8", calibration=[data()], way="each")
    with pytest.raises(CalibrationError):
        sensitivity(net(), data()[:1], "w8", calibration=[])
