"""The checkers of quantization: parts of this package pass, and each fault is found."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_opt.models import ConvNet, ViT
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.layers import base
from lightning_opt.quantization.observers import (
    MSE,
    Entropy,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    _MinMaxState,
)
from lightning_opt.quantization.quantizer import FakeQuantizer
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.testing.quantize import check_observer, check_quantizer

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(), Percentile(q=0.99), MSE(), Entropy()], ids=str)
def test_observers_of_this_package_pass(observer):
    check_observer(observer)
    check_observer(observer, grid=Grid(bits=4))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4g8", "w8a8_dynamic", "w4a4_lsq", "w4a4_pact", "fp8"])
def test_schemes_of_this_package_pass(scheme):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_quantizer(model, X, scheme=scheme)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (ConvNet(num_outputs=4, widths=[8, 16]), torch.randn(4, 1, 8, 8)),
        (
            ViT(image_size=8, patch_size=4, in_channels=1, dim=16, depth=1, heads=4, num_outputs=4),
            torch.randn(4, 1, 8, 8),
        ),
    ],
    ids=["conv_net", "vit"],
)
def test_models_of_this_package_pass(model, x):
    check_quantizer(model, x, scheme=Scheme(activation_observer=MinMax()))


@dataclass(frozen=True)
class Changing(MinMax):
    name: ClassVar[str] = "test_changing"

    def start(self, grid, channels=1):
        return _Changing(grid, channels)


class _Changing(_MinMaxState):
    def update(self, x):
        super().update(x)
        x.mul_(2)


@dataclass(frozen=True)
class Empty(MinMax):
    name: ClassVar[str] = "test_empty"

    def start(self, grid, channels=1):
        return _Empty(grid, channels)


class _Empty(_MinMaxState):
    def range(self):
        return self.high + 1, self.low


@dataclass(frozen=True)
class Fickle(MinMax):
    name: ClassVar[str] = "test_fickle"

    def start(self, grid, channels=1):
        return _Fickle(grid, channels)


class _Fickle(_MinMaxState):
    def range(self):
        return self.low, self.high + torch.rand(1)


@dataclass(frozen=True)
class Forgetful(MinMax):
    name: ClassVar[str] = "test_forgetful"

    def start(self, grid, channels=1):
        return _Forgetful(grid, channels)


class _Forgetful(_MinMaxState):
    def __init__(self, grid, channels):
        super().__init__(grid, channels)
        self.register_buffer("high", torch.zeros(channels), persistent=False)


@dataclass(frozen=True)
class Unmerged(MinMax):
    name: ClassVar[str] = "test_unmerged"

    def start(self, grid, channels=1):
        return _Unmerged(grid, channels)


class _Unmerged(_MinMaxState):
    def reductions(self):
        return [(self.low, "max"), (self.high, "min")]


@dataclass(frozen=True)
class Unknown(MinMax):
    name: ClassVar[str] = "test_unknown"

    def start(self, grid, channels=1):
        return _Unknown(grid, channels)


class _Unknown(_MinMaxState):
    def reductions(self):
        return [(self.low, "median")]


class Lossy(Observer):
    name: ClassVar[str] = "test_lossy"

    def __init__(self, q=1):
        object.__setattr__(self, "q", q)

    def __eq__(self, other):
        return isinstance(other, Lossy) and self.q == other.q

    __hash__ = None

    def to_dict(self):
        return {"name": self.name}

    def start(self, grid, channels=1):
        return _MinMaxState(grid, channels)


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        (Changing(), "changes what it is shown"),
        (Empty(), "is no range"),
        (Fickle(), "give another range"),
        (Forgetful(), "after a checkpoint"),
        (Unmerged(), "two ranks see"),
        (Unknown(), "has 'median'"),
        (Lossy(q=2), "another one"),
    ],
)
def test_faults_of_observers_are_found(observer, message):
    with pytest.raises(AssertionError, match=message):
        check_observer(observer)


def test_a_model_without_layers_that_are_known_is_told():
    with pytest.raises(AssertionError, match="quantizes no layer of Sequential"):
        check_quantizer(nn.Sequential(nn.Tanh()), X)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("freeze", lambda self: None, "has changed after the freeze"),
        ("int_values", lambda self, x: torch.zeros_like(x, dtype=torch.int8), "not those of their integers"),
    ],
)
def test_faults_of_quantizers_are_found(monkeypatch, name, value, message):
    monkeypatch.setattr(FakeQuantizer, name, value)
    with pytest.raises(AssertionError, match=message):
        check_quantizer(net(), X)


def test_observing_in_evaluation_is_found(monkeypatch):
    original = FakeQuantizer.forward

    def forward(self, x):
        if self.observer is not None and self.enabled:
            self.observer.update(x)
        return original(self, x)

    monkeypatch.setattr(FakeQuantizer, "forward", forward)
    with pytest.raises(AssertionError, match="only training and calibration"):
        check_quantizer(net(), X)


def test_an_answer_that_changes_while_switched_off_is_found(monkeypatch):
    original = base.QuantizedLayer.forward
    monkeypatch.setattr(base.QuantizedLayer, "forward", lambda self, x, *a, **k: original(self, x, *a, **k) + 1e-3)
    with pytest.raises(AssertionError, match="switched off change the answer"):
        check_quantizer(net(), X)


def test_gradients_that_do_not_arrive_are_found(monkeypatch):
    original = FakeQuantizer.forward
    monkeypatch.setattr(FakeQuantizer, "forward", lambda self, x: original(self, x).detach() if self.enabled else x)
    with pytest.raises((AssertionError, RuntimeError), match=r"no gradient reaches|does not require grad"):
        check_quantizer(net(), X)
