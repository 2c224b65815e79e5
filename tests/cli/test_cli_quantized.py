"""What a run that quantized puts into its record: one measurement of float model and files, gains, what to deploy."""

import copy
import json

import pytest
import torch

import lightning_opt
from lightning_opt.cli import quantized
from lightning_opt.cli.fitting import Fitted
from lightning_opt.cli.measuring import measure_all
from lightning_opt.cli.pruned import was_pruned
from lightning_opt.cli.stages import stages_of
from lightning_opt.cli.teachers import Found
from lightning_opt.config.build import build_model
from lightning_opt.config.build_fit import build_data
from lightning_opt.config.compose import compose_config, plain, read_command_line
from lightning_opt.quantization.calibration import calibrate
from lightning_opt.quantization.prepare import prepare
from lightning_opt.quantization.state import freeze_observers, is_converted, quantizers, switch_on
from lightning_opt.reporting import new_record, problems, record_schema, render, write_record

WORDS = ("data=digits", "model=mlp", "model.input_shape=[1,8,8]", "model.hidden=[32,16]")
TIMING = ("benchmark.engines=[torch,onnxruntime]", "benchmark.max_seconds=0.6", "export.formats=[safetensors,onnx]")
STAGE = {"method": "quantize", "from_step": 4, "to_step": 9, "what": "w8a8: quantization-aware training"}
QAT = {"_target_": "lightning_opt.callbacks.Quantize", "scheme": "w8a8", "method": "qat"}
AFTER = {**QAT, "method": "post_training"}


@pytest.fixture(scope="module")
def config():
    made = plain(compose_config(read_command_line([*WORDS, *TIMING], config_name="train")))
    return {**made, "quantizer": QAT}


@pytest.fixture(scope="module")
def data(config):
    made = build_data(config)
    made.prepare_data()
    return made


def rounded(config, *, scheme="w8a8", on=True):
    torch.manual_seed(0)
    model = build_model(config["model"]).eval()
    prepare(model, torch.rand(1, 1, 8, 8), scheme)
    calibrate(model, [torch.rand(64, 1, 8, 8)])
    if on:
        switch_on(model)
        freeze_observers(model)
    return model


def fitted(model, *, stages=(STAGE,), acc=0.5):
    return Fitted(model=model, quality={"acc": acc}, best_value=None, steps=9, wall_seconds=0.1, stages=list(stages))


@pytest.fixture(scope="module")
def run(config, data, tmp_path_factory):
    """Give folder, model and record parts of a run that trained a float control too."""
    pytest.importorskip("onnxruntime")
    folder, model = tmp_path_factory.mktemp("quantized"), rounded(config)
    fits = {"baseline": fitted(build_model(config["model"]).eval(), stages=(), acc=0.502), "student": fitted(model)}
    return folder, model, measure_all(config, folder, fits, Found(teachers=[], folders=[]), data)


def test_the_float_model_and_the_files_come_from_one_measurement(run):
    _, _, parts = run
    assert list(parts["models"]) == ["baseline", "student"]
    dense = parts["models"]["baseline"]
    fp32 = {row["batch"]: row["p50"] for row in dense["engines"][0]["latency_ms"]}
    eager = {row["batch"]: row["p50"] for row in dense["latency_ms"]}
    for entry in parts["deployed"]:
        assert [row["batch"] for row in entry["latency_ms"]] == [1, 32]
        for row, gain in zip(entry["latency_ms"], entry["gains"], strict=True):
            assert {"p50", "p95", "p10", "min"} <= row.keys()
            batch = row["batch"]
            assert gain["over_torch_eager"] == pytest.approx(eager[batch] / row["p50"])
            assert gain["over_best_fp32"] == pytest.approx(min(eager[batch], fp32[batch]) / row["p50"])
            assert gain["over_best_bf16"] is None
            assert gain["reasons"]["over_best_bf16"]
    assert "engines" not in parts["models"]["student"]  # its files stand for it


def test_each_deployed_entry_is_whole(run):
    _, _, parts = run
    assert [entry["format"] for entry in parts["deployed"]] == ["safetensors", "onnx"]
    for entry in parts["deployed"]:
        assert entry["precision"] == "int8"
        assert entry["size_bytes"] > 0
        assert entry["quality"]["acc"] >= 0
        assert entry["argmax_agreement"] >= 0.999
        assert entry["max_abs_diff"] >= 0
        assert entry["reference"] == "baseline"
    weights = parts["deployed"][0]
    assert weights["max_abs_diff"] == 0
    assert weights["size_ratio"] == pytest.approx(parts["models"]["baseline"]["size_bytes"] / weights["size_bytes"])


def test_weights_are_counted_before_they_were_rounded(run):
    _, _, parts = run
    student, dense = parts["models"]["student"], parts["models"]["baseline"]
    assert student["params"] == dense["params"] == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    assert student["size_bytes"] < 0.6 * dense["size_bytes"]
    assert parts["comparison"]["quantized_size_ratio"] == pytest.approx(dense["size_bytes"] / student["size_bytes"])


def test_what_was_quantized_and_what_it_cost(run):
    _, _, parts = run
    found = parts["quantization"]
    assert (found["method"], found["reference"], found["judged"]) == ("qat", "baseline", "baseline")
    assert found["quality_drop"] == pytest.approx(0.002)
    assert [(row["kind"], row["weight_bits"], row["activation_bits"]) for row in found["layers"]] == [
        ("Linear", 8, 8)
    ] * 3
    assert found["fused"]["ONNX Runtime"] == {"int8": 3, "total": 3}
    assert found["sentences"]
    assert "pruning" not in parts


def test_what_to_deploy_is_the_faster_one_in_this_measurement(run):
    _, _, parts = run
    found = parts["recommendation"]
    ratio = 1.0
    for row in found["batches"]:
        ratio *= row["ratio"]
    assert ratio >= 1.0
    assert (found["file"] is None) == (found["model"] == "baseline")
    assert found["why"].startswith("Deploy ")


def test_the_artifact_holds_integers_and_answers_like_the_trained_model(run):
    folder, model, parts = run
    assert [edit["op"] for edit in parts["recipe"]] == ["quantize", "quantize_on", "convert"]
    loaded = lightning_opt.load(folder / "artifact")
    assert is_converted(loaded)
    inputs = torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))
    assert not is_converted(model)


def test_the_parts_make_a_valid_record_and_a_report(run):
    folder, _, parts = run
    record = new_record("train.py", seed=1, config_sha256=None) | json.loads(json.dumps(parts))
    record |= {"status": "finished", "finished": record["started"], "wall_seconds": 1.0}
    assert list(problems(record, record_schema())) == []
    write_record(folder, record)
    _, markdown = render(folder)
    words = markdown.read_text(encoding="utf-8")
    assert parts["recommendation"]["why"][:40] in words.replace("\\", "")
    assert "What quantization did" in words


def test_after_training_it_is_compared_with_the_same_weights(config, data, tmp_path):
    late = {**config, "quantizer": AFTER, "export": False, "benchmark": None}
    model = rounded(config)
    parts = measure_all(late, tmp_path, {"student": fitted(model)}, Found(teachers=[], folders=[]), data)
    found = parts["quantization"]
    assert (found["method"], found["reference"], found["judged"]) == ("post_training", "float", "float")
    dense = parts["models"]["float"]
    assert dense["quality"]["acc"] >= 0
    assert found["quality_drop"] == pytest.approx(dense["quality"]["acc"] - 0.5)
    assert parts["recommendation"] is None


def test_the_weights_before_quantization_are_read_from_the_best_checkpoint(config, tmp_path):
    forms = quantized.quantized_of({**config, "quantizer": AFTER}, {"student": fitted(rounded(config))}, pruned=False)
    assert quantized.float_model({**config, "quantizer": AFTER}, tmp_path, forms) is forms.twin
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"damaged")
    assert quantized.float_model({**config, "quantizer": AFTER}, tmp_path, forms) is forms.twin


def test_trained_with_rounding_and_without_a_control_the_cost_is_unknown(config, data, tmp_path):
    alone = {**config, "export": False, "benchmark": None}
    parts = measure_all(alone, tmp_path, {"student": fitted(rounded(config))}, Found(teachers=[], folders=[]), data)
    found = parts["quantization"]
    assert (found["reference"], found["judged"], found["quality_drop"]) == ("float", None, None)
    assert "baseline=true" in found["reasons"]["quality_drop"]


def test_quantizers_that_were_never_on_are_left_out(config, data, tmp_path):
    model = rounded(config, on=False)
    student = fitted(model, stages=())
    assert not quantized.was_quantized(config, student)
    plain_one = quantized.deployable(model)
    assert not quantizers(plain_one)
    inputs = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(plain_one(inputs), model(inputs))
    parts = measure_all(
        {**config, "export": False, "benchmark": None},
        tmp_path,
        {"student": student},
        Found(teachers=[], folders=[]),
        data,
    )
    assert "quantization" not in parts
    assert parts["recipe"] == []


def test_a_float_model_is_deployed_as_it_is(config):
    model = build_model(config["model"])
    assert quantized.deployable(model) is model
    assert not quantized.was_quantized(config, fitted(model, stages=()))


def test_quantization_is_no_pruning(config):
    student = fitted(rounded(config))
    assert not was_pruned({**config, "pruner": None}, student)
    both = [STAGE, {"method": "prune", "from_step": 0, "to_step": 3, "what": "Element"}]
    assert was_pruned({**config, "pruner": None}, fitted(student.model, stages=both))


def test_pruned_and_quantized_shows_each_step(config, data, tmp_path):
    model = rounded(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight[: len(weight) // 2] = 0.0
    switched = copy.deepcopy(model)
    stages = [{"method": "prune", "from_step": 0, "to_step": 3, "what": "Element"}, STAGE]
    both = {**config, "benchmark": {"engines": ["torch"], "max_seconds": 0.3, "batch_sizes": [1]}, "export": False}
    fits = {
        "baseline": fitted(build_model(config["model"]).eval(), stages=()),
        "student": fitted(switched, stages=stages),
    }
    parts = measure_all(both, tmp_path, fits, Found(teachers=[], folders=[]), data)
    assert set(parts["models"]) == {"baseline", "float", "student"}
    assert parts["pruning"]["kind"] == "structured" or parts["pruning"]["totals"]["sparsity"] > 0.4
    rows = parts["pruning"]["latency"]
    assert rows[0]["pruned_ms"] == parts["models"]["float"]["latency_ms"][0]["p50"]
    assert parts["quantization"]["reference"] == "float"
    assert parts["quantization"]["judged"] == "baseline"
    assert parts["models"]["student"]["params_nonzero"] < 0.7 * parts["models"]["baseline"]["params_nonzero"]


def test_bits_chosen_layer_by_layer_reach_the_record(config, data, tmp_path):
    rows = [{"name": "layers.0.0", "sensitivity": 0.25, "reason": ""}]

    class Told:
        def stages(self):
            return [{**STAGE, "layers": rows}]

    class Trainer:
        callbacks = (Told(),)

    told = stages_of(Trainer())
    assert told == [{**STAGE, "layers": rows}]
    alone = {**config, "export": False, "benchmark": None}
    student = fitted(rounded(config), stages=told)
    parts = measure_all(alone, tmp_path, {"student": student}, Found(teachers=[], folders=[]), data)
    costs = {row["name"]: row["sensitivity"] for row in parts["quantization"]["layers"]}
    assert costs["layers.0.0"] == 0.25
    assert all("layers" not in stage for stage in parts["stages"])
