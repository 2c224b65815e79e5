"""What to deploy: the fastest whose quality is good enough, and the float model where few bits do not pay."""

import copy

import pytest
from fake_quantized import BF16_MS, FAST_MS, SLOW_MS, few_bit_files, float_entry, quantized_record

from lightning_opt.reporting import render_comparison, write_record
from lightning_opt.reporting.quantized_tables import engine_rows
from lightning_opt.reporting.recommendation import recommendation


def choose(*, times=FAST_MS, acc=0.943, bf16=BF16_MS, bf16_acc=None, max_drop=None, judged="float", **more):
    models = {"float": float_entry(acc=0.945, bf16=bf16, bf16_acc=bf16_acc), "student": {}}
    files = few_bit_files(times, acc=acc)
    return recommendation(models, files, metric="acc", reference="float", judged=judged, max_drop=max_drop, **more)


def test_the_file_with_the_smallest_product_of_latencies():
    found = choose()
    assert (found["format"], found["precision"], found["file"]) == ("openvino", "int8", "artifact/model.xml")
    assert found["model"] == "student"
    ratios = {row["batch"]: row["ratio"] for row in found["batches"]}
    assert ratios == pytest.approx({1: 0.15 / 0.10, 32: 3.0 / 2.5})
    assert {row["over"] for row in found["batches"]} == {"OpenVINO bf16"}
    assert found["quality_drop"] == pytest.approx(0.002)
    assert [row["engine"] for row in found["by_batch"]] == ["OpenVINO int8", "ONNX Runtime int8"]


def test_the_float_model_where_few_bits_do_not_pay():
    found = choose(times=SLOW_MS, bf16=None)
    assert (found["format"], found["precision"], found["file"], found["model"]) == ("openvino", "fp32", None, "float")
    assert "do not pay on this machine" in found["why"]
    assert "1.10× slower at batch 1" in found["why"]
    assert "3.1× smaller" in found["why"]


def test_never_slower_than_the_best_engine_of_the_float_model():
    for scale in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        times = {"onnx": (9.0, 90.0), "openvino": (0.30 * scale, 5.0 * scale)}
        found = choose(times=times, bf16=None)
        assert (found["file"] is None) == (scale > 1), scale
        if scale == 0.999:
            assert "as fast as the float model" in found["why"]


def test_too_large_a_loss_of_quality_is_no_bargain():
    found = choose(acc=0.90)
    assert found["file"] is None
    assert "4.5 points worse" in found["why"]
    assert "0.5 points may be lost" in found["why"]
    assert choose(acc=0.90, max_drop=0.05)["file"] == "artifact/model.xml"
    assert choose(acc=0.943, max_drop=0.001)["file"] is None


def test_quality_is_that_through_each_engine():
    models = {"float": float_entry(acc=0.945), "student": {}}
    files = few_bit_files(FAST_MS)
    files[-1]["quality"] = {"acc": 0.80}  # this engine saturates
    found = recommendation(models, files, metric="acc", reference="float", judged="float")
    assert found["format"] == "onnx"


def test_a_float_engine_that_rounds_is_judged_too():
    times = {"onnx": (9.0, 90.0), "openvino": (9.0, 90.0)}
    assert choose(times=times, bf16_acc=0.945)["precision"] == "bf16"
    assert choose(times=times, bf16_acc=0.80)["precision"] == "fp32"


def test_lower_is_better():
    models = {"float": float_entry(acc=2.0), "student": {}}
    models["float"]["quality"] = {"loss": 2.0}
    files = few_bit_files(FAST_MS)
    for loss, accepted in ((2.015, True), (2.5, False)):
        for entry in files:
            entry["quality"] = {"loss": loss}
        found = recommendation(models, files, metric="loss", higher_is_better=False, reference="float", judged="float")
        assert (found["file"] is not None) == accepted


def test_without_a_float_model_to_compare_with_the_loss_is_unknown():
    found = choose(judged=None)
    assert found["file"] == "artifact/model.xml"
    assert found["quality_drop"] is None
    assert "is not known" in found["why"]


def test_a_busy_machine_is_read_by_its_least_disturbed_calls():
    models = {"float": float_entry(acc=0.945), "student": {}}
    files = few_bit_files(FAST_MS)
    for entry in (models["float"], *models["float"]["engines"], *files):
        for row in entry["latency_ms"]:
            row["p10"] = row["p50"]
    for row in files[-1]["latency_ms"]:
        row["p50"] *= 50  # another process took the core
    quiet = recommendation(models, files, metric="acc", reference="float", judged="float")
    assert (quiet["format"], quiet["basis"]) == ("onnx", "p50")
    noisy = copy.deepcopy(files)
    noisy[-1]["reasons"]["latency_quality"] = "noisy"
    busy = recommendation(models, noisy, metric="acc", reference="float", judged="float")
    assert (busy["format"], busy["basis"]) == ("openvino", "p10")
    assert "The machine was busy" in busy["why"]


def test_nothing_timed_is_no_recommendation():
    models = {"float": float_entry(acc=0.945) | {"latency_ms": None, "engines": []}, "student": {}}
    assert recommendation(models, few_bit_files(FAST_MS), metric="acc", reference="float", judged="float") is None
    assert recommendation(models, [], metric="acc", reference="float", judged="float") is None


def test_several_runs_are_named_by_what_was_done(tmp_path):
    runs = []
    for name, choice in {"a": {}, "b": {"acc": 0.94}}.items():
        record = quantized_record(**choice)
        record["command"] = f"python train.py quantizer={name}"
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, record)
        runs.append(tmp_path / name)
    _, path = render_comparison(runs, tmp_path / "out")
    markdown = path.read_text(encoding="utf-8")
    assert "student" not in markdown
    assert "| float | quantized | over float |" in markdown
    assert "in its best engine" in markdown
    row = next(line for line in markdown.split("## Cost")[1].splitlines() if line.startswith("| quantizer=a |"))
    assert "0.100 ms" in row
    assert "3.0×" in row  # 0.30 ms in the best fp32 engine


def test_the_control_is_a_choice_too_where_pruning_went_too_far():
    record = quantized_record(pruned=True, acc=0.70, float_acc=0.70)
    found = record["recommendation"]
    assert (found["model"], found["file"]) == ("baseline", None)
    assert found["why"].startswith("Deploy the dense model in ")
    rows = engine_rows(record)
    assert [(row["model"], row["label"]) for row in rows if row["chosen"]] == [("baseline", "OpenVINO")]
    assert {row["model"] for row in rows} == {"float", "baseline", "student"}


def test_the_file_that_is_spoken_of_is_the_fastest_also_where_its_quality_rules_it_out():
    models = {"float": float_entry(acc=0.945), "student": {}}
    files = few_bit_files({"onnx": (0.35, 5.5), "openvino": (9.0, 90.0)})
    files[-2]["quality"] = {"acc": 0.80}
    found = recommendation(models, files, metric="acc", reference="float", judged="float")
    assert found["model"] == "float"
    assert "ONNX Runtime int8" in found["why"]
    assert {row["over"] for row in found["batches"]} == {"ONNX Runtime int8"}
