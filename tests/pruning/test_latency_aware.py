"""Latency-aware widths: what is cut is what saves time, in the steps that the engine likes."""

import itertools

import pytest
import torch
from torch import nn

from lightning_opt.pruning.latency import AnalyticTimes, LatencyAware, MeasuredTimes, Times, layers_of
from lightning_opt.pruning.structure import trace
from lightning_opt.pruning.structured import Structures, choose


class Net(nn.Module):
    """`slow` runs at full resolution, `fast` at a quarter of it in each direction; both are equally wide."""

    def __init__(self):
        super().__init__()
        self.slow = nn.Conv2d(8, 64, 3, padding=1)
        self.back = nn.Conv2d(64, 8, 3, stride=4)
        self.fast = nn.Conv2d(8, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.back(torch.relu(self.slow(x))))
        return self.head(torch.relu(self.fast(x)).mean((2, 3)))


X = torch.zeros(1, 8, 32, 32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Net().train()


@pytest.fixture(scope="module")
def structure(model):
    return trace(model, X, ignore=["back.bias"])


class Macs(Times):
    """As if time were multiply-accumulates, in millions."""

    def ms(self, layer, outputs, inputs):
        return outputs * inputs * layer.kernel * layer.positions / 1e6


def test_the_layers_are_those_that_ran(model):
    layers = {layer.weight: layer for layer in layers_of(model, X)}
    assert list(layers) == ["slow.weight", "back.weight", "fast.weight", "head.weight"]
    assert [layers[f"{name}.weight"].positions for name in ("slow", "back", "fast", "head")] == [1024, 64, 64, 1]
    assert layers["slow.weight"].widths == (64, 8)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_the_greedy_choice_is_the_best_of_all(model, structure):
    """Beside every pair of widths: none that reaches the goal loses less than one step more than what was found."""
    layers, names = layers_of(model, X), {"slow": 64, "fast": 64}
    scores = {name: torch.linspace(0.1, 1.0, 64) for name in names}
    kept = choose(structure, scores, ratio=0.5, allocation=LatencyAware(layers, Macs()), round_to=8)
    widths = {name: len(kept.get(name, range(64))) for name in names}

    def macs(slow, fast):
        return slow * 8 * 9 * 1024 + 8 * slow * 9 * 64 + fast * 8 * 9 * 64 + fast * 10

    def lost(slow, fast):
        share = [scores["slow"].sort().values[64 - width :].sum() / scores["slow"].sum() for width in (slow, fast)]
        return -(share[0] * share[1]).log().item()

    assert macs(*widths.values()) <= 0.5 * macs(64, 64)
    feasible = [pair for pair in itertools.product(range(8, 65, 8), repeat=2) if macs(*pair) <= 0.5 * macs(64, 64)]
    best = min(feasible, key=lambda pair: lost(*pair))
    assert widths["slow"] < widths["fast"] == 64  # the fast one saves next to nothing
    assert lost(*widths.values()) <= lost(best[0], best[1]) + 1e-6
    assert kept["slow"] == list(range(64 - widths["slow"], 64))


def test_lanes_make_whole_steps_worth_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 16)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    net, x = Two(), torch.zeros(64, 16)
    found = trace(net, x)
    scores = {group.name: torch.ones(48) for group in Structures().of(found)}
    times = AnalyticTimes(lane=16, overhead_ms=0.0)
    kept = choose(found, scores, ratio=0.3, allocation=LatencyAware(layers_of(net, x), times))
    assert {len(units) for units in kept.values()} <= {16, 32}  # though any width was allowed


def test_analytic_times_are_a_staircase(model):
    layer = layers_of(model, X)[0]
    times = AnalyticTimes(lane=16, gflops=10.0, gigabytes_per_s=1e9, overhead_ms=0.5)
    expected = 0.5 + 2 * 32 * 16 * 9 * 1024 / 10e9 * 1e3
    assert times.ms(layer, 17, 8) == times.ms(layer, 32, 16) == pytest.approx(expected)
    slow_memory = AnalyticTimes(lane=1, gflops=1e9, gigabytes_per_s=1.0, overhead_ms=0.0)
    bytes_moved = 4 * (64 * 8 * 9 + 8 * 1024 + 64 * 1024)
    assert slow_memory.ms(layer, 64, 8) == pytest.approx(bytes_moved / 1e9 * 1e3)


def test_measured_times_are_those_of_the_timer_and_bilinear_in_between(model):
    calls = []

    def timer(layer, x):
        calls.append((layer.out_channels, x.shape[1]))
        assert layer(x).shape == (1, layer.out_channels, 32, 32)
        return layer.out_channels * x.shape[1] / 100 + 1

    layer, times = layers_of(model, X)[0], MeasuredTimes(timer)
    for outputs, inputs in ((64, 8), (32, 8), (40, 8), (23, 8)):
        assert times.ms(layer, outputs, inputs) == pytest.approx(outputs * inputs / 100 + 1)
    assert calls == [(16, 8), (32, 8), (64, 8)]  # each once
    assert times.ms(layer, 4, 8) == pytest.approx((16 * 8 / 100 + 1) / 4)
    depthwise = nn.Conv2d(32, 32, 3, groups=32)
    (layer,) = layers_of(depthwise, torch.zeros(1, 32, 6, 6))
    assert layer.is_depthwise
    built = []
    MeasuredTimes(lambda module, x: built.append((module.groups, tuple(x.shape))) or 1.0).ms(layer, 32, 32)
    assert built == [(16, (1, 16, 6, 6)), (32, (1, 32, 6, 6))]


def test_a_real_layer_takes_time_and_more_when_it_is_larger():
    net = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 16))
    layers, times = layers_of(net, torch.zeros(64, 256)), MeasuredTimes()
    assert 0 < times.ms(layers[0], 512, 256) < times.ms(layers[0], 2048, 256)


def test_bad_requests(model, structure):
    with pytest.raises(ValueError, match="layers is empty"):
        LatencyAware([])
    layers = layers_of(model, X)
    with pytest.raises(ValueError, match="max_ratio"):
        LatencyAware(layers, max_ratio=0.0)
    scores = {"fast": torch.ones(64)}
    with pytest.raises(ValueError, match=r"ratio=0\.5 of the time cannot be reached: what may be cut saves 0\.05"):
        choose(structure, scores, ratio=0.5, allocation=LatencyAware(layers, Macs(), max_ratio=1.0))
    with pytest.raises(ValueError, match="of='flops'"):
        choose(structure, scores, of="flops", allocation=LatencyAware(layers))


def test_of_flops_the_ratio_is_of_them_and_time_decides_where(model, structure):
    """With a timer that takes only `slow` to cost time, only it is cut, until the model has half of its operations."""

    class SlowOnly(Times):
        def ms(self, layer, outputs, inputs):
            return float(outputs) if layer.weight == "slow.weight" else 0.0

    layers, scores = layers_of(model, X), {"slow": torch.ones(64), "fast": torch.ones(64)}
    how = LatencyAware(layers, SlowOnly(), of="flops")
    kept = choose(structure, scores, ratio=0.5, allocation=how, round_to=8)
    assert set(kept) == {"slow"}
    whole = structure.flops()
    assert structure.flops(kept) <= 0.5 * whole < structure.flops({"slow": range(len(kept["slow"]) + 8)})
    assert sum(layer.flops(*layer.widths) for layer in layers) == whole
    with pytest.raises(ValueError, match=r"ratio=0\.99 of the flops cannot be reached"):
        choose(structure, scores, ratio=0.99, allocation=how)
    with pytest.raises(ValueError, match="of='macs'"):
        LatencyAware(layers, of="macs")
