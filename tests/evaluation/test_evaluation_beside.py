"""Files take their turns between the models: one measurement, one clock, the same rounds."""

import pytest
import torch
from torch import nn

from lightning_opt.evaluation import measure, measure_beside
from lightning_opt.evaluation.latency import latency_row
from lightning_opt.quantization.post_training import quantize


class Counting:
    engine, dtype = "an engine", "float32"

    def __init__(self, calls, name, dtype="float32"):
        self.calls, self.name, self.dtype = calls, name, dtype

    def bind(self, inputs):
        self.calls.append(("bind", self.name, tuple(inputs.shape)))
        return lambda: self.calls.append(("run", self.name))

    def predict(self, inputs):
        return torch.zeros(len(inputs), 2)


class Noted(nn.Module):
    def __init__(self, calls, name):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls, self.name = calls, name

    def forward(self, x):
        self.calls.append(("run", self.name))
        return x


def test_a_row_holds_percentiles_and_the_least_disturbed_calls():
    samples = tuple(float(n) for n in range(1, 101))
    row = latency_row(samples, batch=4)
    assert row["batch"] == 4
    assert (row["p50"], row["min"]) == (50.5, 1.0)
    assert row["p10"] == 1 + 0.1 * 99
    assert latency_row((3.0, 2.0), batch=1)["p95"] is None


def test_files_are_timed_between_the_models():
    calls = []
    models = {"a": Noted(calls, "a"), "b": Noted(calls, "b")}
    found = measure_beside(
        models,
        torch.zeros(1, 3),
        runners={"onnx": Counting(calls, "onnx")},
        batch_sizes=(1, 5),
        rounds=12,
        max_seconds=5.0,
    )
    assert [row["batch"] for row in found.runners["onnx"]["latency_ms"]] == [1, 5]
    assert {("bind", "onnx", (1, 3)), ("bind", "onnx", (5, 3))} <= set(calls)
    assert found.runners["onnx"]["throughput_per_s"][1]["value"] > 0
    start = calls.index(("bind", "onnx", (1, 3)))
    order = [name for kind, name, *_ in calls[start + 1 :] if kind == "run"]
    turns = [order[place : place + 3] for place in range(0, 3 * 12, 3)]
    assert all(sorted(turn) == ["a", "b", "onnx"] for turn in turns)
    assert len({turn[0] for turn in turns[3:]}) == 3  # each is first in some round
    assert set(found.models) == {"a", "b"}


def test_few_rounds_leave_a_reason():
    found = measure_beside(
        {"a": nn.Linear(3, 2)}, torch.zeros(1, 3), runners={"f": Counting([], "f")}, batch_sizes=(1,), rounds=5
    )
    assert found.runners["f"]["latency_ms"][0]["p95"] is None
    assert "too few" in found.runners["f"]["reasons"]["latency_ms"]


def test_a_model_that_is_only_eager_is_built_in_no_other_engine():
    models = {"float": nn.Linear(3, 2), "few": nn.Linear(3, 2)}
    asked = {"batch_sizes": (1,), "rounds": 3, "engines": ["torch", "torch:bfloat16"]}
    found = measure_beside(models, torch.zeros(1, 3), runners={}, only_eager=["few"], **asked)
    assert [engine["dtype"] for engine in found.models["float"]["engines"]] == ["bfloat16"]
    assert "engines" not in found.models["few"]


def test_engines_that_round_are_judged():
    models = {"float": nn.Linear(3, 2)}
    asked = {"batch_sizes": (1,), "rounds": 3, "engines": ["torch", "torch:bfloat16"]}
    inputs = torch.zeros(1, 3)

    def judge(predict):
        return {"acc": float(predict(inputs).shape[-1])}

    found = measure_beside(models, inputs, runners={}, judge=judge, **asked)
    assert found.models["float"]["engines"][0]["quality"] == {"acc": 2.0}
    found = measure_beside(models, inputs, runners={}, **asked)
    assert "quality" not in found.models["float"]["engines"][0]


def test_a_model_of_integers_runs_as_integers_in_other_engines():
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    few = quantize(model, x[:1], "w8a8", calibration=[x])
    asked = {"batch_sizes": (1,), "rounds": 3, "engines": ["torch", "torch:bfloat16", "onnxruntime"]}
    found = measure({"float": model, "few": few}, x[:1], **asked)
    assert [(engine["dtype"], engine["dense"]) for engine in found["few"]["engines"]] == [("int8", False)]
    kinds = [(engine["dtype"], engine["dense"]) for engine in found["float"]["engines"]]
    assert kinds == [("bfloat16", True), ("float32", True)]
