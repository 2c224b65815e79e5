import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import MSE, MinMax, Percentile
from lightning_opt.quantization.scheme import Scheme

NAMES = ["w8a8", "w4a8", "w8a8_dynamic", "w8", "w4g32", "w4g32a8", "w2a8_lsq", "w4a4_pact", "w2_lsq", "fp8"]


@pytest.mark.parametrize("name", NAMES)
def test_a_scheme_survives_json(name):
    scheme = Scheme.parse(name).with_rules({"head.*": None, "type:Linear": {"weight": Grid(bits=4), "attention": True}})
    again = Scheme.from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme
    assert hash(again) == hash(scheme)


@given(weight=st.integers(2, 8), activation=st.integers(2, 8))
def test_bits_are_read(weight, activation):
    scheme = Scheme.parse(f"w{weight}a{activation}")
    assert (scheme.weight.bits, scheme.weight.axis, scheme.weight.symmetric) == (weight, 0, True)
    assert (scheme.activation.bits, scheme.activation.qmin, scheme.activation.axis) == (activation, 0, None)
    assert scheme.needs_calibration
    only = Scheme.parse(f"w{weight}")
    assert only.activation is None
    assert not only.needs_calibration


def test_kinds_are_read():
    dynamic, groups, learned, clip, float8 = (
        Scheme.parse(name) for name in ("w8a8_dynamic", "w4g32", "w4a4_lsq", "w4a4_pact", "fp8")
    )
    assert dynamic.dynamic
    assert not dynamic.needs_calibration
    assert groups.weight.group_size == 32
    assert (learned.learnable, learned.clip, clip.learnable, clip.clip) == (True, False, False, True)
    assert float8.weight.dtype == float8.activation.dtype == "float8_e4m3fn"


@pytest.mark.parametrize(
    "name", ["", "int8", "w9a8", "w8a", "w8_dynamic", "w8_pact", "w8a8_dynamic_lsq", "w4g0", "W8A8"]
)
def test_an_unknown_name_says_what_is_known(name):
    with pytest.raises(ValueError, match=r"w8a8|group_size|dynamic"):
        Scheme.parse(name)


def test_an_embedding_has_a_grid_of_its_own_and_no_activation():
    scheme = Scheme(embedding=Grid(bits=4, axis=0))
    layer = scheme.layer("words", nn.Embedding(4, 2))
    assert (layer.weight.bits, layer.activation) == (4, None)
    assert not Scheme.parse("w8a8_dynamic").layer("words", nn.Embedding(4, 2)).dynamic
    assert Scheme(embedding=None).layer("words", nn.Embedding(4, 2)) is None
    assert scheme.layer("fc", nn.Linear(2, 2)).weight.bits == 8


def test_rules_apply_in_order_to_what_they_match():
    scheme = Scheme(
        rules={
            "blocks.*": {"weight": {"bits": 4}},
            "blocks.0.*": {"activation": None, "weight_observer": "mse"},
            "type:Conv2d": {"weight_observer": {"name": "percentile", "q": 0.99}},
            "blocks.0.head": None,
        }
    )
    linear, conv = nn.Linear(2, 2), nn.Conv2d(2, 2, 1)
    assert scheme.layer("stem", linear) == Scheme().layer("stem", linear)
    first = scheme.layer("blocks.0.fc", linear)
    assert (first.weight.bits, first.weight.axis, first.activation, first.weight_observer) == (4, 0, None, MSE())
    assert scheme.layer("blocks.1.fc", linear).activation is not None
    assert scheme.layer("stem", conv).weight_observer == Percentile(q=0.99)
    assert scheme.layer("blocks.0.head", conv) is None
    assert scheme.layer("blocks.0.headless", linear) is not None


def test_a_type_rule_matches_subclasses():
    class Mine(nn.Linear):
        pass

    scheme = Scheme(rules={"type:Linear": None})
    assert scheme.layer("a", Mine(2, 2)) is None
    assert Scheme(rules={"type:Mine": None}).layer("a", nn.Linear(2, 2)) is not None


def test_a_later_rule_brings_a_layer_back():
    scheme = Scheme(rules={"*": None, "fc": {"weight": {"bits": 4}}})
    assert scheme.layer("fc", nn.Linear(2, 2)).weight.bits == 4
    assert scheme.layer("conv", nn.Conv2d(2, 2, 1)) is None


def test_rules_on_top_replace_those_of_the_same_pattern():
    scheme = Scheme(rules={"a": None, "b": None}).with_rules({"a": {"weight": {"bits": 4}}})
    assert list(scheme.rules) == ["b", "a"]
    assert scheme.layer("a", nn.Linear(2, 2)).weight.bits == 4


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Scheme(rules={"a": {"bits": 4}}), r"rules\['a'\].*'bits'"),
        (lambda: Scheme(rules={"a": {"weight": {"bits": 99}}}), "99"),
        (lambda: Scheme(rules={"a": {"weight_observer": "median"}}), "median.*min_max"),
        (lambda: Scheme(dynamic=True, activation=None), "activation"),
        (lambda: Scheme(dynamic=True, learnable=True), "learned"),
        (lambda: Scheme.from_dict({"weights": None}), "'weights' is not a field"),
    ],
)
def test_what_cannot_be_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_observers_come_along():
    layer = Scheme(weight_observer=MSE(steps=20), activation_observer=MinMax()).layer("fc", nn.Linear(2, 2))
    assert (layer.weight_observer, layer.activation_observer) == (MSE(steps=20), MinMax())
