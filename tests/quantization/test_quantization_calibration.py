"""Calibration: ranges are those of the data, bad data change nothing, the same data give the same ranges."""

import copy

import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.quantization.calibration import CalibrationError, calibrate, collect, limited
from lightning_opt.quantization.post_training import post_training_scheme
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import quantizers, switch_on


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


def net(scheme="w8a8"):
    torch.manual_seed(0)
    model = Net()
    prepare(model, draw(2, 8), post_training_scheme(scheme))
    return model


def batches(count=4):
    return [draw(8, 8, seed=i) for i in range(count)]


def test_ranges_are_the_smallest_and_largest_values_of_all_batches():
    model, seen = net(), []
    model.second.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    assert calibrate(model, batches()) == 32
    x, hidden = torch.cat(batches()), torch.cat(seen)
    wanted = {float((values.max() - values.min().clamp(max=0)) / 255) for values in (x, hidden)}
    scales = [float(q.scale) for name, q in quantizers(model).items() if not name.endswith("weight_quantizer")]
    assert all(min(abs(scale - one) for scale in scales) < 1e-6 for one in wanted)
    assert all(q.is_fitted for name, q in quantizers(model).items() if not name.endswith("weight_quantizer"))


def test_the_model_runs_in_eval_and_nothing_but_quantizers_changes():
    model = net().train()
    model.first.eval()
    before = copy.deepcopy(model.state_dict())
    calibrate(model, batches())
    assert model.training
    assert not model.first.training
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "quantizer" not in name)
    assert not any(quantizer.observing for quantizer in quantizers(model).values())


def test_the_same_batches_give_the_same_ranges_whatever_was_seen_before():
    models = [net(), net()]
    calibrate(models[1], [100.0 * x for x in batches()])
    for model in models:
        calibrate(model, batches())
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_limit_counts_samples_and_draws_no_batch_more():
    drawn = []

    def endless():
        for i in range(1000):
            drawn.append(i)
            yield draw(8, 8, seed=i)

    model, cut = net(), net()
    assert calibrate(model, endless(), limit=20) == 20
    assert drawn == [0, 1, 2]
    calibrate(cut, [torch.cat(batches(3))[:20]])
    scales = [[float(q.scale.sum()) for q in quantizers(one).values()] for one in (model, cut)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)
    assert [len(x) for x in limited(batches(), 12)] == [8, 4]


def nan_inside():
    found = batches()
    found[2][3, 4] = torch.nan
    return found


class Answering(Net):
    answer = torch.nan

    def forward(self, x):
        return super().forward(x) * self.answer


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (nan_inside(), {}, "calibration batch 2 holds NaN or infinite values"),
        ([draw(8, 8) / 0.0], {}, "calibration batch 0 holds NaN or infinite values"),
        ([], {}, "calibration has no samples"),
        (iter(()), {}, "calibration has no samples"),
        (batches(), {"limit": 64}, "calibration has 32 samples, 64 were asked for"),
    ],
)
def test_bad_data_are_one_error_and_change_nothing(data, arguments, message):
    model = net()
    calibrate(model, batches(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=message) as caught:
        calibrate(model, data, **arguments)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(quantizer.observing for quantizer in quantizers(model).values())


def test_a_model_that_answers_with_nan_is_one_error():
    model = Answering()
    prepare(model, draw(2, 8), "w8a8")
    with pytest.raises(CalibrationError, match="the model answers calibration batch 0 with NaN"):
        calibrate(model, batches())


def test_dynamic_and_weight_only_ranges_are_left_alone():
    for scheme in ("w8a8_dynamic", "w4g8"):
        model = net(scheme)
        before = copy.deepcopy(model.state_dict())
        assert calibrate(model, batches()) == 32
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_learned_ranges_that_have_begun_to_learn_stay():
    model = net(Scheme.parse("w8a8_lsq"))
    calibrate(model, batches())
    switch_on(model)
    learned = {name: q.scale.detach().clone() for name, q in quantizers(model).items()}
    calibrate(model, [10.0 * x for x in batches()])
    assert all(torch.equal(q.scale, learned[name]) for name, q in quantizers(model).items())


def test_batches_take_the_form_of_the_example():
    x, y = draw(4, 8), torch.zeros(4)
    assert collect([(x, y), [x, y], x], x[:1])[1] is x
    assert collect([(x, x, y)], (x, x)) == [(x, x)]
    ids = {"input_ids": torch.ones(4, 3, dtype=torch.int64), "attention_mask": torch.ones(4, 3)}
    (found,) = collect([{**ids, "labels": y}], ids)
    assert list(found) == ["input_ids", "attention_mask"]
    with pytest.raises(CalibrationError, match="a calibration batch lacks 'attention_mask'"):
        collect([{"input_ids": x}], ids)
    with pytest.raises(CalibrationError, match=r"a calibration batch is a Tensor; example_inputs has 2 tensor\(s\)"):
        collect([x], (x, x))
    with pytest.raises(CalibrationError, match="calibration batch 0 holds NaN"):
        collect([x / 0.0 * 0.0], x)
