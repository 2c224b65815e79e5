import json

import pytest
import torch
from torch import nn

from lightning_opt.quantization.mixed_precision import _Search, _Step, mixed_precision
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.scheme import Scheme


def data(n=512):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 8, generator=generator)


@pytest.fixture(scope="module")
def trained():
    """A network that has learned something, with one layer that few bits cannot hold."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), data()
    target = (x @ torch.randn(8, 4, generator=torch.Generator().manual_seed(2))).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()
    with torch.no_grad():
        net[0].weight[0].zero_()
        net[0].bias[0] = 0.0
        net[2].weight[:, 0] = 30.0  # never reached, but each row's range
    return net.eval(), x, target


def accuracy(x, target):
    @torch.no_grad()
    def evaluate(model):
        evaluate.calls += 1
        return float((model(x).argmax(1) == target).float().mean())

    evaluate.calls = 0
    return evaluate


@pytest.mark.parametrize("bits", [(), (6, 8)])
def test_the_limit_holds_on_the_real_metric(trained, bits):
    net, x, target = trained
    evaluate = accuracy(x, target)
    found = mixed_precision(
        net, x[:1], "w4a8", evaluate=evaluate, max_drop=0.02, calibration=x.split(128), bits=bits, max_evaluations=20
    )
    assert found.reference == pytest.approx(evaluate(net))
    assert found.start < found.reference - 0.02  # or there was nothing to do
    assert found.value >= found.reference - 0.02
    assert found.evaluations == evaluate.calls - 1 <= 20
    again = quantize(net, x[:1], found.scheme, calibration=x.split(128))
    assert evaluate(again) == pytest.approx(found.value)
    rows = {row.name: row for row in found.rows}
    assert found.rows[0].name == "2"
    assert rows["2"].weight_bits != 4
    assert rows["2"].reason
    assert rows["4"].weight_bits == 4  # what need not be wider is not
    assert rows["4"].reason == ""


def test_nothing_is_changed_within_the_limit(trained):
    net, x, target = trained
    evaluate = accuracy(x, target)
    found = mixed_precision(net, x[:1], "w4a8", evaluate=evaluate, max_drop=0.9, calibration=[x])
    assert dict(found.scheme.rules) == {}
    assert (found.evaluations, evaluate.calls) == (2, 2)
    assert [row.reason for row in found.rows] == ["", "", ""]
    assert found.sensitivities()["2"] == max(found.sensitivities().values())


def test_the_table_is_plain_and_ranked(trained):
    net, x, target = trained
    found = mixed_precision(net, x[:1], "w4a8", evaluate=accuracy(x, target), max_drop=0.01, calibration=[x])
    table = json.loads(json.dumps(found.table()))
    assert [row["sensitivity"] for row in table] == sorted((row["sensitivity"] for row in table), reverse=True)
    assert set(table[0]) == {"name", "sensitivity", "params", "weight_bits", "activation_bits", "reason"}
    assert Scheme.from_dict(json.loads(json.dumps(found.scheme.to_dict()))) == found.scheme


def test_a_loss_is_kept_low(trained):
    net, x, target = trained

    @torch.no_grad()
    def loss(model):
        return float(nn.functional.cross_entropy(model(x), target))

    found = mixed_precision(net, x[:1], "w4a8", evaluate=loss, max_drop=0.05, calibration=[x], higher_is_better=False)
    assert found.start > found.reference + 0.05
    assert found.value <= found.reference + 0.05


def test_a_limit_that_nothing_meets_gives_the_float_model(trained):
    net, x, _ = trained
    calls = []

    def only_float(model):
        calls.append(model)
        return 1.0 if len(calls) == 1 else 0.0

    found = mixed_precision(net, x[:1], "w8a8", evaluate=only_float, max_drop=0.1, calibration=[x], max_evaluations=6)
    assert all(row.weight_bits is None for row in found.rows)
    assert set(found.scheme.rules.values()) == {None}
    assert found.value == 1.0
    assert len(calls) <= 6


class Steps:
    """A search over made-up steps: what is measured depends on which are done."""

    def __init__(self, needed, gains, left=50):
        self.steps = [_Step(name, None, gain, bits) for name, gain, bits in gains]
        self.asked = []
        modules = {step.name: nn.Linear(1, 1) for step in self.steps}
        self.search = _Search(self.measure, Scheme(), modules, floor=0.5, left=left)
        self.needed = needed
        self.search.run(self.steps)

    def measure(self, scheme):
        self.asked.append(set(scheme.rules))
        return float(self.needed <= set(scheme.rules))

    @property
    def chosen(self):
        return {step.name for step in self.search.best}


GAINS = [(name, 1.0, place + 1) for place, name in enumerate("abcdefgh")]


@pytest.mark.parametrize("needed", [{"a"}, {"e"}, {"h"}, {"b", "g"}, set("abc")])
def test_only_what_is_needed_is_chosen(needed):
    assert Steps(needed, GAINS).chosen == needed


def test_a_search_that_runs_out_keeps_what_is_known_to_hold():
    found = Steps({"e"}, GAINS, left=3)
    assert len(found.asked) == 3
    assert "e" in found.chosen


@pytest.mark.parametrize(("fields", "named"), [({"max_drop": -0.1}, "-0.1"), ({"max_evaluations": 1}, "1")])
def test_what_cannot_be_is_refused(trained, fields, named):
    net, x, target = trained
    values = {"max_drop": 0.1, "evaluate": accuracy(x, target), "calibration": [x], **fields}
    with pytest.raises(ValueError, match=named):
        mixed_precision(net, x[:1], "w8a8", **values)


def test_a_float_model_without_a_metric_is_refused(trained):
    net, x, _ = trained
    with pytest.raises(ValueError, match="nan"):
        mixed_precision(net, x[:1], "w8a8", evaluate=lambda model: float("nan"), max_drop=0.1, calibration=[x])
