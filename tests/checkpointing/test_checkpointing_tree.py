"""Trees of values as JSON: what goes in comes out, exactly, and nothing else does."""

import json
import math
import struct
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from lightning_opt.checkpointing.tree import decode, encode
from lightning_opt.errors import ConfigError, UntrustedInputError

FLOATS = some.floats(allow_nan=True, allow_infinity=True) | some.just(-0.0)
LEAVES = some.none() | some.booleans() | some.integers() | FLOATS | some.text() | some.binary()
KEYS = some.text() | some.just("$") | some.integers() | some.booleans() | some.tuples(some.integers(), some.text())
TREES = some.recursive(
    LEAVES,
    lambda inner: (
        some.lists(inner)
        | some.lists(inner).map(tuple)
        | some.dictionaries(KEYS, inner)
        | some.dictionaries(some.text(), inner).map(OrderedDict)
    ),
    max_leaves=12,
)


def there_and_back(value):
    encoded, tensors = encode(value, prefix="rest")
    return decode(json.loads(json.dumps(encoded, allow_nan=False)), tensors.__getitem__)


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack(">d", one) == struct.pack(">d", other)
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_any_tree_comes_back_exactly(value):
    assert same(there_and_back(value), value)


def test_what_json_has_no_word_for():
    value = {
        "complex": complex(-0.0, math.inf),
        "set": {1, "a"},
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.bfloat16,
        "layout": torch.strided,
        "bytearray": bytearray(b"\x00\xff"),
        "counter": Counter("abba"),
        "numpy": np.float32(0.1),
    }
    found = there_and_back(value)
    assert found == {**value, "numpy": float(np.float32(0.1))}
    assert [type(one) for one in found.values()] == [type(one) for one in [*value.values()][:-1]] + [float]


def test_tensors_are_kept_apart_once_each_under_their_place():
    tensor, state = torch.arange(3.0), nn.BatchNorm1d(2).state_dict()
    value = {"a": [tensor, {"b": tensor}], "p": nn.Parameter(torch.ones(2), requires_grad=False), "state": state}
    encoded, tensors = encode(value, prefix="rest")
    assert sorted(tensors)[:2] == ["rest.a.0", "rest.p"]
    found = decode(encoded, tensors.__getitem__)
    assert found["a"][0] is found["a"][1]["b"]
    assert torch.equal(found["a"][0], tensor)
    assert isinstance(found["p"], nn.Parameter)
    assert not found["p"].requires_grad
    assert found["state"]._metadata == state._metadata


def test_names_of_tensors_do_not_clash():
    value = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    found = there_and_back(value)
    assert (float(found["a.b"]), float(found["a"]["b"])) == (0.0, 1.0)


class StrictInt(int):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Path("x"),
        nn.Linear(1, 1),
        np.zeros(2),
        StrictInt(1),
        len,
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_refused_by_its_place(value):
    with pytest.raises(ConfigError, match=r"a\.1"):
        encode({"a": [0, value]})


@pytest.mark.parametrize(
    "hostile",
    [
        {"$": "eval", "v": "__import__('os')"},
        {"$": "dtype", "v": "load"},
        {"$": "dtype", "v": "os.system"},
        {"$": "layout", "v": "float32"},
        {"$": "float", "v": "zz"},
        {"$": "float"},
        {"$": "device", "v": "nowhere:x"},
        {"$": "set", "v": [[]]},
        {"$": "dict", "v": [1]},
        {"$": ["tensor"], "v": 1},
        {"$": "bytes", "v": "*"},
        {"$": "tensor", "v": "gone"},
        {"$": "dict", "v": [[{"$": "dict", "v": []}, 1]]},
    ],
    ids=str,
)
def test_what_encode_does_not_write_is_refused(hostile):
    with pytest.raises(UntrustedInputError):
        decode({"x": [hostile]}, {}.__getitem__)
