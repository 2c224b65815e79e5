"""What a summary counts is counted here again by numpy and by hand; sentences follow the numbers they are given."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.pruning.claims import claims
from lightning_opt.pruning.summary import latencies, pruning_summary
from lightning_opt.surgery import DropLayers, Recipe, replay


class Net(nn.Module):
    def __init__(self, width=16, hidden=32, depth=2):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.into = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, 5)

    def forward(self, x):
        x = self.into(self.conv(x).relu().mean(dim=(2, 3)))
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


INPUTS = torch.zeros(1, 3, 8, 8)


def measures(times, *, dtype="float32"):
    """Give measures as `evaluation.measure` does, for {engine: {batch: ms}}."""

    def rows(of_batch):
        return [{"batch": batch, "p50": ms, "p95": None, "p99": None} for batch, ms in of_batch.items()]

    own, *others = times.items()
    entry = {"runtime": {"engine": own[0], "dtype": dtype, "threads": 1}, "latency_ms": rows(own[1])}
    entry["engines"] = [
        {"engine": name, "dtype": dtype, "threads": 1, "latency_ms": rows(of_batch)} for name, of_batch in others
    ]
    return entry


def zeroed(share, *, seed=0):
    model = Net()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= torch.tensor(rng.random(weight.shape) >= share, dtype=torch.float32)
    return model


def row(summary, name):
    return next(each for each in summary["layers"] if each["name"] == name)


def test_zeros_in_unchanged_shapes():
    model = zeroed(0.9)
    summary = pruning_summary(model, Net(), example_inputs=INPUTS)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            values = weight.detach().numpy()
            found = row(summary, name)
            assert found["nonzero"] == np.count_nonzero(values)
            assert found["sparsity"] == pytest.approx(np.mean(values == 0))
            assert found["kept"] == pytest.approx(np.mean(values != 0))
            assert found["shape"] == found["original_shape"] == list(values.shape)
            assert found["zeros"] == "unstructured"
    everything = np.concatenate([weight.detach().numpy().ravel() for weight in model.parameters()])
    assert summary["totals"]["params"] == summary["totals"]["params_before"] == everything.size
    assert summary["totals"]["nonzero"] == np.count_nonzero(everything)
    assert summary["kind"] == "unstructured"
    assert "conv.bias" not in {each["name"] for each in summary["layers"]}


def test_operations_of_each_layer_by_formula():
    summary = pruning_summary(Net(width=8), Net(width=16), example_inputs=INPUTS)
    pixels, per_output = 8 * 8, 2 * 3 * 3 * 3
    assert row(summary, "conv.weight")["flops_before"] == pixels * per_output * 16
    assert row(summary, "conv.weight")["flops"] == pixels * per_output * 8
    assert row(summary, "into.weight")["flops"] == 2 * 8 * 32
    total = pixels * per_output * 8 + 2 * (8 * 32 + 2 * 32 * 32 + 32 * 5)
    assert summary["totals"]["flops"] == total


def test_smaller_shapes_are_structured():
    summary = pruning_summary(Net(width=8), Net(width=16), example_inputs=INPUTS)
    assert summary["kind"] == "structured"
    assert row(summary, "conv.weight")["original_shape"] == [16, 3, 3, 3]
    assert row(summary, "conv.weight")["shape"] == [8, 3, 3, 3]
    assert row(summary, "conv.weight")["kept"] == pytest.approx(0.5)
    assert row(summary, "conv.weight")["sparsity"] == 0.0
    assert summary["kinds"] == [{"kind": "structured", "layers": 2, "params": 8 * 27 + 8 * 32}]


def test_smaller_shapes_with_zeros_in_them_are_both():
    model = Net(width=8)
    with torch.no_grad():
        model.blocks[0].weight[torch.tensor(np.random.default_rng(1).random((32, 32)) < 0.8)] = 0
    assert pruning_summary(model, Net())["kind"] == "structured + unstructured"


def test_layers_that_were_dropped_are_followed_through_their_new_names():
    original = Net(depth=4)
    recipe = Recipe([DropLayers(path="blocks", kept=(0, 3))])
    model = replay(Net(depth=4), recipe)
    model.load_state_dict(
        {
            name.replace("blocks.3", "blocks.1"): value
            for name, value in original.state_dict().items()
            if not name.startswith(("blocks.1", "blocks.2"))
        }
    )
    summary = pruning_summary(model, original, recipe=recipe, example_inputs=INPUTS)
    gone = [each for each in summary["layers"] if each["shape"] is None]
    assert [each["name"] for each in gone] == ["blocks.1.weight", "blocks.2.weight"]
    assert row(summary, "blocks.0.weight")["shape"] == [32, 32]
    assert summary["totals"]["params_before"] - summary["totals"]["params"] == 2 * (32 * 32 + 32)
    assert summary["kind"] == "structured"


def test_zeros_that_the_fresh_model_has_are_not_pruned():
    def table():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 4))

    summary = pruning_summary(table(), table())
    assert summary["kind"] == "none"
    assert summary["kinds"] == []
    assert "Nothing was pruned" in summary["sentences"][0]


def test_sizes_on_disk():
    dense, sparse = Net(width=64, hidden=256), Net(width=64, hidden=256)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in sparse.parameters():
            if weight.ndim > 1:
                weight *= torch.tensor(rng.random(weight.shape) >= 0.9, dtype=torch.float32)
    sizes = pruning_summary(sparse, dense)["size_bytes"]
    weights = [weight for weight in sparse.parameters() if weight.ndim > 1]
    count = sum(weight.numel() for weight in weights)
    nonzero = sum(int((weight != 0).sum()) for weight in weights)
    rest = sum(weight.numel() for weight in sparse.parameters()) - count
    header = 4096
    assert sizes["dense"] == sizes["before"]
    assert 4 * (count + rest) <= sizes["dense"] <= 4 * (count + rest) + header
    assert count / 8 + 4 * nonzero <= sizes["bitmask"] <= count / 8 + 4 * (nonzero + rest) + header
    assert count / 8 + 2 * nonzero <= sizes["bitmask_fp16"] <= count / 8 + 2 * (nonzero + rest) + header
    assert sizes["compressed"] < sizes["bitmask"]


def test_latencies_are_joined_by_engine_and_batch():
    dense = measures({"torch eager": {1: 2.0, 32: 30.0}, "ONNX Runtime": {1: 1.0}, "OpenVINO": {1: 1.0}})
    pruned = measures({"torch eager": {1: 1.0, 32: 20.0}, "ONNX Runtime": {1: 0.8}})
    rows = latencies(dense, pruned)
    assert [(each["engine"], each["batch"], round(each["ratio"], 4)) for each in rows] == [
        ("torch eager", 1, 2.0),
        ("torch eager", 32, 1.5),
        ("ONNX Runtime", 1, 1.25),
    ]
    half = measures({"torch eager": {1: 1.0}}, dtype="bfloat16")
    assert latencies(dense, half) == []


def said(model, original, dense, pruned, **more):
    return " ".join(
        pruning_summary(model, original, dense=measures(dense), pruned=measures(pruned), **more)["sentences"]
    )


def test_zeros_that_gain_nothing_are_called_so_with_the_measured_ratios():
    dense = {"torch eager": {1: 1.00, 32: 9.0}, "ONNX Runtime": {1: 0.50, 32: 4.0}}
    pruned = {"torch eager": {1: 1.01, 32: 8.9}, "ONNX Runtime": {1: 0.50, 32: 4.1}}
    words = said(zeroed(0.9), Net(), dense, pruned)
    assert "give no speed on this machine" in words
    for ratio in ("0.99× in torch eager", "1.00× in ONNX Runtime", "1.01× in torch eager", "0.98× in ONNX Runtime"):
        assert ratio in words, ratio
    assert "pruner=channels" in words


def test_zeros_that_an_engine_does_gain_from_are_not_called_useless():
    words = said(
        zeroed(0.9),
        Net(),
        {"torch eager": {1: 1.0}, "sparse engine": {1: 0.9}},
        {"torch eager": {1: 1.0}, "sparse engine": {1: 0.3}},
    )
    assert "no speed" not in words
    assert "3.00× in sparse engine" in words
    assert "pruner=channels" not in words


def test_a_gain_in_a_slow_engine_alone_is_no_gain():
    dense = {"torch eager": {1: 3.0}, "OpenVINO": {1: 1.0}}
    words = said(zeroed(0.9), Net(), dense, {"torch eager": {1: 1.5}, "OpenVINO": {1: 1.0}})
    assert "with each model in its fastest engine they give no speed (1.00×)" in words


def test_smaller_shapes_say_which_share_of_the_operations_ratio_is_realised():
    words = said(
        Net(width=8), Net(width=16), {"torch eager": {1: 2.0}}, {"torch eager": {1: 1.25}}, example_inputs=INPUTS
    )
    before, after = (64 * 54 * width + 2 * (width * 32 + 2 * 32 * 32 + 32 * 5) for width in (16, 8))
    assert "1.60× in torch eager" in words
    assert f"FLOPs ratio is {before / after:.2f}×" in words
    assert f"realises {100 * 1.6 / (before / after):.0f} %" in words
    assert "No engine became faster" not in words
    slow = said(Net(width=8), Net(width=16), {"torch eager": {1: 2.0}}, {"torch eager": {1: 1.98}})
    assert "No engine became faster" in slow


def test_without_latencies_nothing_is_said_about_speed():
    summary = pruning_summary(zeroed(0.9), Net())
    assert summary["latency"] == []
    assert summary["reasons"]["latency"]
    words = " ".join(summary["sentences"])
    assert "nothing is said about speed" in words
    assert not re.search(r"\d× in ", words)


def test_two_to_four_names_what_it_needs():
    model = Net()
    with torch.no_grad():
        for seed, block in enumerate(model.blocks):
            order = np.random.default_rng(seed).random((256, 4)).argsort(axis=1)
            block.weight *= torch.tensor(order < 2, dtype=torch.float32).reshape(32, 32)
    words = said(model, Net(), {"torch eager": {1: 1.0}}, {"torch eager": {1: 1.0}})
    assert "sparse tensor cores" in words


def test_a_forward_that_fails_leaves_a_reason_and_the_rest():
    summary = pruning_summary(zeroed(0.5), Net(), example_inputs=torch.zeros(1, 7))
    assert summary["totals"]["flops"] is None
    assert "could not be counted" in summary["reasons"]["flops"]
    assert summary["totals"]["sparsity"] > 0.4


def test_the_summary_is_plain_json():
    summary = pruning_summary(zeroed(0.5), Net(), example_inputs=INPUTS)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert claims(summary) == summary["sentences"]


def test_times_from_a_busy_machine_are_called_so():
    busy = measures({"torch eager": {1: 1.0}}) | {"reasons": {"latency_quality": "noisy"}}
    quiet = measures({"torch eager": {1: 1.0}})
    for dense, pruned, expected in ((busy, quiet, True), (quiet, busy, True), (quiet, quiet, False)):
        words = " ".join(pruning_summary(zeroed(0.9), Net(), dense=dense, pruned=pruned)["sentences"])
        assert ("was busy" in words) == expected


def test_a_busy_machine_has_no_realised_share():
    busy = measures({"torch eager": {1: 2.0}}) | {"reasons": {"latency_quality": "noisy"}}
    summary = pruning_summary(
        Net(width=8), Net(width=16), example_inputs=INPUTS, dense=busy, pruned=measures({"torch eager": {1: 1.0}})
    )
    assert "realises" not in " ".join(summary["sentences"])
