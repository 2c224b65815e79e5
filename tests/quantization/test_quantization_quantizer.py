import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_opt.quantization.functional import fake_quantize, scale_and_zero_point
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import MSE, Entropy, MinMax, MovingAverage, Percentile
from lightning_opt.quantization.quantizer import FakeQuantizer, calibrating, is_calibrating

ACTIVATION = Grid(symmetric=False, signed=False, narrow=False)
WEIGHT = Grid(bits=4, axis=0)
OBSERVERS = [MinMax(), MovingAverage(), Percentile(), MSE(), Entropy()]


def values(seed=0, shape=(6, 8, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fitted(**kwargs):
    quantizer = FakeQuantizer(ACTIVATION, observer=MinMax(), **kwargs)
    quantizer(values())
    quantizer.fit()
    quantizer.enabled = True
    quantizer.freeze()
    return quantizer


def test_disabled_it_returns_the_very_tensor():
    x = values()
    quantizer = FakeQuantizer(ACTIVATION, observer=MinMax())
    assert quantizer(x) is x
    assert not quantizer.is_fitted
    assert float(quantizer.observer.high) == float(x.max())  # it looked, all the same


def test_it_observes_in_training_and_in_calibration_only():
    quantizer = FakeQuantizer(ACTIVATION, observer=MinMax()).eval()
    quantizer(values())
    assert float(quantizer.observer.high) == 0
    with calibrating():
        assert is_calibrating()
        quantizer(values(1))
    assert not is_calibrating()
    assert float(quantizer.observer.high) == float(values(1).max())
    quantizer.train()
    quantizer.freeze()
    quantizer(values() * 100)
    assert float(quantizer.observer.high) == float(values(1).max())


def test_values_are_those_of_the_integers():
    quantizer, x = fitted(), values(3) * 2
    q = quantizer.int_values(x)
    assert q.dtype == torch.uint8
    assert torch.equal(quantizer(x), quantizer.values(q))
    wanted = scale_and_zero_point(values().min().reshape(1), values().max().reshape(1), ACTIVATION)
    assert torch.equal(quantizer(x), fake_quantize(x, *wanted, ACTIVATION))


def test_enabled_and_observing_it_follows_what_it_sees():
    quantizer = FakeQuantizer(ACTIVATION, observer=MovingAverage(momentum=0.5))
    quantizer.enabled = True
    quantizer(values(0))
    quantizer(values(1) * 3)
    low = (values(0).min() + values(1).min() * 3) / 2
    high = (values(0).max() + values(1).max() * 3) / 2
    scale, zero_point = scale_and_zero_point(low.reshape(1), high.reshape(1), ACTIVATION)
    assert torch.allclose(quantizer.scale, scale)
    assert torch.equal(quantizer.zero_point, zero_point)
    assert quantizer.is_fitted


def test_a_weight_has_the_range_of_now_until_frozen():
    quantizer = FakeQuantizer(WEIGHT)
    quantizer.enabled = True
    for seed in (0, 1):
        w = values(seed)
        quantizer(w)
        assert torch.equal(quantizer.scale, w.abs().amax((1, 2)) / 7)
    quantizer.freeze()
    before = quantizer.scale.clone()
    quantizer(values(2) * 5)
    assert torch.equal(quantizer.scale, before)


def test_the_gradient_of_a_weight_that_is_followed_passes_everywhere():
    quantizer, w = FakeQuantizer(WEIGHT), values().requires_grad_()
    quantizer.enabled = True
    quantizer(w).backward(values(1))
    assert torch.equal(w.grad, values(1))
    quantizer.freeze()
    w.grad = None
    with torch.no_grad():
        w.mul_(2)
    quantizer(w).backward(values(1))
    outside = w.abs() > 7.5 * quantizer.scale.reshape(-1, 1, 1)
    assert outside.any()
    assert torch.equal(w.grad == 0, outside)


def test_dynamic_keeps_nothing():
    quantizer = FakeQuantizer(ACTIVATION, dynamic=True)
    quantizer.enabled = True
    x = values()
    scale, zero_point = scale_and_zero_point(x.min().reshape(1), x.max().reshape(1), ACTIVATION)
    assert torch.equal(quantizer(x), fake_quantize(x, scale, zero_point, ACTIVATION))
    assert float(quantizer.scale) == 1
    assert quantizer.is_fitted
    with pytest.raises(ValueError, match="dynamic"):
        FakeQuantizer(ACTIVATION, dynamic=True, learnable=True)


@pytest.mark.parametrize("clip", [False, True])
def test_learned_scales_learn(clip):
    quantizer = FakeQuantizer(Grid(bits=2, symmetric=False, signed=False), observer=MinMax(), learnable=True, clip=clip)
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"]
    x = values(shape=(4000,)).abs()
    quantizer(x)
    quantizer.fit()
    quantizer.enabled = True
    with torch.no_grad():  # far too narrow: only clipped values can say so
        quantizer.scale.div_(8)
    optimizer = torch.optim.Adam([quantizer.scale], lr=0.02)
    errors = []
    for _ in range(60):
        error = (quantizer(x) - x).square().sum()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize("clip", [False, True])
def test_a_learned_scale_that_went_past_zero_comes_back(clip):
    quantizer = fitted(learnable=True, clip=clip)
    with torch.no_grad():
        quantizer.scale.sub_(1.0)
    x = values().requires_grad_()
    out = quantizer(x) + quantizer(x * 2)  # used twice in one graph
    out.sum().backward()
    assert quantizer.scale.item() > 0
    assert torch.isfinite(quantizer.scale.grad).all()
    assert torch.isfinite(out).all()


def test_a_learned_scale_is_not_moved_by_what_is_observed():
    quantizer = FakeQuantizer(ACTIVATION, observer=MinMax(), learnable=True)
    quantizer(values())
    quantizer.fit()
    quantizer.enabled = True
    before = quantizer.scale.detach().clone()
    quantizer(values() * 9)
    assert torch.equal(quantizer.scale.detach(), before)


def test_a_weight_must_be_given():
    with pytest.raises(ValueError, match="weight"):
        FakeQuantizer(WEIGHT).fit()


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: o.name)
@pytest.mark.parametrize("learnable", [False, True])
def test_copies_pickles_and_files_are_the_same(observer, learnable, tmp_path):
    quantizer = FakeQuantizer(ACTIVATION, observer=observer, learnable=learnable)
    quantizer(values())
    quantizer.fit()
    quantizer.enabled = True
    save_file({name: value.contiguous() for name, value in quantizer.state_dict().items()}, tmp_path / "q.safetensors")
    fresh = FakeQuantizer(ACTIVATION, observer=observer, learnable=learnable)
    fresh.load_state_dict(load_file(tmp_path / "q.safetensors"))
    fresh.enabled = True
    assert fresh.is_fitted
    others = copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh
    for seed in (1, 2):  # they also go on in the same way
        wanted = quantizer(values(seed) * 3)
        assert all(torch.equal(other(values(seed) * 3), wanted) for other in others)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_state_of_another_width_is_loaded(learnable):
    wide, narrow = (FakeQuantizer(WEIGHT, learnable=learnable, channels=n) for n in (6, 4))
    wide.fit(values())
    narrow.fit(values(1, (4, 8, 5)))
    scale = wide.scale
    wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide.scale, narrow.scale)
    assert wide.zero_point.shape == (4,)
    assert wide.is_fitted
    if learnable:
        assert wide.scale is scale  # an optimizer that holds the parameter still does
        wide.scale.sum().backward()
        assert wide.scale.grad.shape == (4,)


def test_a_resized_quantizer_starts_anew():
    quantizer = FakeQuantizer(Grid(axis=1), observer=MinMax(), channels=8)
    quantizer(values())
    quantizer.fit()
    quantizer.resize(3)
    assert not quantizer.is_fitted
    assert quantizer.observer.low.shape == (3,)
    quantizer(values(1, (2, 3)))
    quantizer.fit()
    assert torch.equal(quantizer.observer.high, values(1, (2, 3)).amax(0).clamp(min=0))


def test_parameters_are_never_without_dims():
    quantizers = [FakeQuantizer(ACTIVATION, learnable=True), FakeQuantizer(WEIGHT, clip=True, channels=6)]
    assert all(parameter.dim() == 1 for quantizer in quantizers for parameter in quantizer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_its_ranges_in_float32(dtype):
    quantizer = FakeQuantizer(ACTIVATION, observer=MovingAverage())
    quantizer.enabled = True
    out = quantizer(values().to(dtype))
    assert out.dtype == dtype
    assert quantizer.scale.dtype == torch.float32
    assert (out.float() - values()).abs().max() < 0.05


@pytest.mark.parametrize("observing", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "channel", "lsq"])
def test_it_compiles_without_a_break(kind, observing):
    quantizer = {
        "tensor": lambda: FakeQuantizer(ACTIVATION, observer=MovingAverage()),
        "channel": lambda: FakeQuantizer(WEIGHT, channels=6),
        "lsq": lambda: FakeQuantizer(ACTIVATION, observer=MinMax(), learnable=True),
    }[kind]()
    quantizer.fit(values())
    quantizer.enabled, quantizer.observing = True, observing
    other = copy.deepcopy(quantizer)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        x, y = values(seed).requires_grad_(), values(seed).requires_grad_()
        plain, made = quantizer(x), compiled(y)
        assert torch.equal(plain, made)
        plain.square().sum().backward()
        made.square().sum().backward()
        assert torch.equal(x.grad, y.grad)
    assert torch.equal(quantizer.scale, other.scale)


def test_a_fresh_quantizer_in_a_model_trains(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)
            self.weight_quantizer = FakeQuantizer(WEIGHT, channels=3)
            self.input_quantizer = FakeQuantizer(ACTIVATION, observer=MovingAverage())

        def forward(self, x):
            return nn.functional.linear(self.input_quantizer(x), self.weight_quantizer(self.fc.weight), self.fc.bias)

    torch.manual_seed(0)
    net, x = Net(), values(0, (256, 8))
    target = (x @ values(1, (8, 3))).argmax(1)
    net.weight_quantizer.enabled = net.input_quantizer.enabled = True
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()
    assert (net.eval()(x).argmax(1) == target).float().mean() > 0.9
