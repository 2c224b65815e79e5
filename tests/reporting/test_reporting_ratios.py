"""The comparison against numbers worked out by hand."""

import pytest

from lightning_opt.reporting import comparison


def _model(quality, *, metric="acc", params=100, p50=2.0, **more):
    return {
        "quality": {metric: quality},
        "params": params,
        "size_bytes": 4 * params,
        "latency_ms": [{"batch": 1, "p50": p50, "p95": p50, "p99": p50}],
        "throughput_per_s": [{"batch": 1, "value": 1000 / p50}],
        "runtime": {"engine": "torch eager", "dtype": "fp32"},
    } | more


@pytest.mark.parametrize(
    ("teacher", "alone", "student", "closure"),
    [
        (0.7942, 0.7250, 0.7828, 0.578 / 0.692),  # resnet32x4 -> resnet8x4 on CIFAR-100: published accuracies
        (0.7561, 0.7326, 0.7695, 3.69 / 2.35),  # WRN-40-2 -> WRN-16-2: the student passes its teacher
        (0.9, 0.8, 0.75, -0.5),  # distillation hurt
    ],
)
def test_gap_closure(teacher, alone, student, closure):
    result = comparison({"teacher": _model(teacher), "baseline": _model(alone), "student": _model(student)})
    assert result["gap_closure"] == pytest.approx(closure, rel=1e-9)
    assert result["baseline_gain"] == pytest.approx(student - alone)
    assert result["quality_gap"] == pytest.approx(teacher - student)


def test_gap_closure_where_lower_is_better():
    models = {name: _model(value, metric="mae") for name, value in (("teacher", 1.0), ("baseline", 3.0))}
    models["student"] = _model(1.5, metric="mae")
    result = comparison(models, higher_is_better=False)
    assert result["gap_closure"] == pytest.approx(0.75)
    assert result["baseline_gain"] == pytest.approx(1.5)
    assert result["quality_kept"] is None


def test_no_gap_no_closure():
    result = comparison({"teacher": _model(0.8), "baseline": _model(0.8), "student": _model(0.9)})
    assert result["gap_closure"] is None
    assert "no gap to close" in result["reasons"]["gap_closure"]


def test_ratios_are_reference_over_student():
    models = {"teacher": _model(0.9, params=1200, p50=6.0), "student": _model(0.8, params=100, p50=1.5)}
    result = comparison(models)
    assert result["params_ratio"] == 12
    assert result["size_ratio"] == 12
    assert result["latency_ratio"] == [{"batch": 1, "value": 4.0}]
    assert result["throughput_ratio"][0]["value"] == pytest.approx(4.0)
    assert result["flops_ratio"] is None
    assert result["reasons"]["flops_ratio"]


def test_a_batch_that_only_one_was_measured_at_is_left_out():
    student = _model(0.8, latency_ms=[{"batch": 8, "p50": 1.0, "p95": 1.0, "p99": 1.0}])
    result = comparison({"teacher": _model(0.9), "student": student})
    assert result["latency_ratio"] is None
    assert result["speedup"] is None


def test_gain_is_also_given_over_the_best_dense_engines():
    rows = {"eager": 8.0, "fp32": 4.0, "bf16": 3.0, "sparse": 1.0}
    at = {name: [{"batch": 1, "p50": p50, "p95": p50, "p99": p50}] for name, p50 in rows.items()}
    engines = [
        {"engine": "ONNX Runtime", "dtype": "fp32", "latency_ms": at["fp32"]},
        {"engine": "torch compiled", "dtype": "bfloat16", "latency_ms": at["bf16"]},
        {"engine": "OpenVINO", "dtype": "fp32", "dense": False, "latency_ms": at["sparse"]},
    ]
    teacher = _model(0.9, p50=8.0, engines=engines)
    deployed = [{"format": "onnx", "runtime": {"engine": "ONNX Runtime"}, "latency_ms": [{"batch": 1, "p50": 0.5}]}]
    (row,) = comparison({"teacher": teacher, "student": _model(0.8, p50=2.0)}, deployed=deployed)["speedup"]
    assert row["engine"] == "ONNX Runtime"
    assert row["over_torch_eager"] == 16
    assert row["over_best_dense_fp32"] == 8
    assert row["over_best_dense_bf16"] == 6


@pytest.mark.parametrize("names", [(), ("student",), ("teacher",), ("baseline", "student"), ("teacher", "student")])
def test_models_may_be_missing(names):
    result = comparison({name: _model(0.9) for name in names})
    assert result.get("gap_closure") is None
    assert "student" not in names or result["reasons"]["gap_closure"]
