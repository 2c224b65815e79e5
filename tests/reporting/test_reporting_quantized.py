"""The report of a run that quantized: what to deploy and why, its numbers, its names, its figures."""

import copy
import json
import re

import jsonschema
import matplotlib
import numpy as np
import pytest
from fake_quantized import (
    BF16_MS,
    EAGER_MS,
    FAST_MS,
    FLOAT_MS,
    SLOW_MS,
    few_bit_files,
    float_entry,
    make_quantized_run,
    quantized_record,
)
from fake_run import HOSTILE, full_record, make_run, rename

from lightning_opt.reporting import problems, record_schema, render, run_metrics, style, summary, verdict, write_record
from lightning_opt.reporting.gains import is_quantized, precision_of, quantized_rows, with_gains
from lightning_opt.reporting.names import model_name
from lightning_opt.reporting.quantized_figures import draw_bits, draw_engines, draw_steps


def texts(figure):
    return [found.get_text() for found in figure.findobj(matplotlib.text.Text) if found.get_text()]


def read(folder):
    html, markdown = render(folder)
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8").replace("\\", "")


def cells(markdown, first):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    folder = make_quantized_run(tmp_path_factory.mktemp("fast") / "run")
    return folder, *read(folder)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    choice = {"method": "post_training", "baseline": False, "mixed": True, "times": SLOW_MS, "bf16": None}
    folder = make_quantized_run(tmp_path_factory.mktemp("mixed") / "run", **choice)
    return folder, *read(folder)


def test_a_file_gains_over_torch_eager_and_over_the_best_engine_of_each_format():
    reference = float_entry(acc=0.945, bf16=BF16_MS)
    entry = next(each for each in few_bit_files(FAST_MS) if each["format"] == "onnx")
    found = with_gains(entry, name="baseline", reference=reference)
    for place, batch in enumerate((1, 32)):
        row = found["gains"][place]
        own = FAST_MS["onnx"][place]
        assert row["batch"] == batch
        assert row["over_torch_eager"] == pytest.approx(FLOAT_MS["torch eager"][place] / own)
        assert row["over_best_fp32"] == pytest.approx(min(ms[place] for ms in FLOAT_MS.values()) / own)
        assert row["over_best_bf16"] == pytest.approx(BF16_MS[place] / own)
        assert (row["best_fp32_engine"], row["best_bf16_engine"]) == ("OpenVINO", "OpenVINO bf16")
    assert found["size_ratio"] == pytest.approx(reference["size_bytes"] / entry["size_bytes"])


def test_what_was_not_measured_has_a_reason():
    reference = float_entry(acc=0.945) | {"size_bytes": None}
    entry = with_gains(few_bit_files(FAST_MS)[0], name="float", reference=reference)
    assert entry["gains"][0]["over_best_bf16"] is None
    assert "bf16" in entry["gains"][0]["reasons"]["over_best_bf16"]
    assert entry["size_ratio"] is None
    assert entry["reasons"]["size_ratio"]


@pytest.mark.parametrize(
    ("precision", "dtype", "name", "few"),
    [
        ("int8", "float32", "int8", True),
        ("int4 weights", "float32", "int4 weights", True),
        ("fp32", "float32", "fp32", False),
        (None, "bfloat16", "bf16", False),
        (None, None, "fp32", False),
    ],
)
def test_what_counts_as_few_bits(precision, dtype, name, few):
    entry = {"precision": precision, "runtime": {"engine": "ONNX Runtime", "dtype": dtype}}
    assert precision_of(entry) == name
    assert is_quantized(entry) == few


def test_the_fastest_file_at_each_batch_size():
    rows = quantized_record()["comparison"]["quantized"]
    assert [(row["batch"], row["engine"], row["p50"]) for row in rows] == [
        (1, "OpenVINO int8", FAST_MS["openvino"][0]),
        (32, "ONNX Runtime int8", FAST_MS["onnx"][1]),
    ]
    assert quantized_rows([], "float") == []


def test_speedup_of_the_comparison_knows_the_files():
    rows = quantized_record()["comparison"]["speedup"]
    assert rows[0]["engine"] == "OpenVINO int8"
    assert rows[0]["over_best_dense_fp32"] == pytest.approx(FLOAT_MS["OpenVINO"][0] / FAST_MS["openvino"][0])


def test_the_first_sentence_says_quality_size_and_speed(fast):
    _, html, markdown = fast
    sentence = verdict(quantized_record()).sentence
    assert "keeps 99.8 % of the float model's acc (0.943 of 0.945, 0.2 points less)" in sentence
    assert "takes 62.0 kB on disk instead of 227 kB" in sentence
    assert f"is {BF16_MS[0] / FAST_MS['openvino'][0]:.2f}× faster at batch 1 in OpenVINO int8" in sentence
    assert sentence in markdown
    why = quantized_record()["recommendation"]["why"]
    assert why in html.replace("&#39;", "'")
    assert "artifact/model.xml" in why


@pytest.mark.parametrize(
    ("choice", "mood"),
    [
        ({}, "good"),
        ({"times": SLOW_MS, "bf16": None}, "mixed"),
        ({"baseline": False}, "mixed"),
        ({"acc": 0.70}, "bad"),
        ({"acc": 0.93}, "mixed"),
    ],
)
def test_moods(choice, mood):
    assert verdict(quantized_record(**choice)).mood == mood


def test_names_of_the_models():
    named = {
        "qat": ({}, {"baseline": "float", "student": "quantized"}),
        "alone": ({"baseline": False}, {"float": "float, same weights", "student": "quantized"}),
        "after": ({"baseline": False, "method": "post_training"}, {"float": "float", "student": "quantized"}),
        "pruned": (
            {"pruned": True},
            {"baseline": "dense", "float": "pruned, float", "student": "pruned + quantized"},
        ),
        "taught": (
            {"teacher": True},
            {"teacher": "teacher", "baseline": "float alone", "student": "distilled + quantized"},
        ),
    }
    for choice, names in named.values():
        record = quantized_record(**choice)
        assert {name: model_name(record, name) for name in record["models"]} == names


def test_every_engine_and_file_in_one_table(fast):
    _, _, markdown = fast
    for engine, (first, second) in FLOAT_MS.items():
        row = cells(markdown, f"float, {engine}")
        assert row[1].startswith(f"{first:.3f}"[:5])
        assert row[3].startswith(f"{second:.2f}"[:4])
        assert row[-1] == "0.945"
    assert cells(markdown, "OpenVINO int8 (recommended)")[1] == "0.100 ms"
    assert cells(markdown, "float, OpenVINO bf16")[-1] == "–"  # its quality was not taken


def test_gains_and_parity_in_one_table(fast):
    table = fast[2].split("| file |")[1]
    row = cells(table, "ONNX Runtime int8")
    assert row[1:4] == ["4.00×", "1.50×", "0.75×"]
    assert row[4:7] == ["4.00×", "2.50×", "1.50×"]
    assert row[-3:] == ["99.94 %", "0.0310", "1.20"]


def test_layers_with_their_bits_and_why_not(mixed):
    _, html, markdown = mixed
    table = markdown.split("## What quantization did")[1]
    assert cells(table, "body.0")[1:5] == ["Conv2d", "18.4 k", "int4 per channel", "uint8"]
    row = cells(table, "head")
    assert row[3:5] == ["float", "float"]
    assert row[-1] == "quantizing it costs more than max_drop"
    assert "gate stays in float: no integer form of GRU is known" in html
    assert cells(table, "1")[1:4] == ["head", "0.0310", "float"]  # the ranking: the dearest first
    assert cells(table, "4")[1] == "body.1"


def test_many_layers_keep_the_largest_and_sum_up_the_rest(tmp_path):
    record = quantized_record()
    one = record["quantization"]["layers"][0]
    record["quantization"]["layers"] = [one | {"name": f"layer{n}", "params": 1000 + n} for n in range(75)]
    write_record(tmp_path, record)
    _, markdown = read(tmp_path)
    assert "| layer74 |" in markdown
    assert "| layer20 |" not in markdown
    assert "35 smaller ones" in markdown


def test_what_engines_run_in_integers_and_what_the_processor_lacks():
    said = " ".join(verdict(quantized_record()).caveats)
    assert "OpenVINO runs 3 of 4 convolutions" in said
    assert "VNNI" not in said
    said = " ".join(verdict(quantized_record(instructions=("avx2",))).caveats)
    assert "no instructions for products of 8-bit integers (VNNI)" in said


def test_without_a_control_the_cost_in_quality_is_called_unknown(tmp_path):
    folder = make_quantized_run(tmp_path / "run", baseline=False)
    _, markdown = read(folder)
    assert "what quantization cost in quality is not known" in markdown
    assert "what that costs in acc is not known" in markdown


def test_the_terminal_shows_each_model_in_its_best_engine():
    words = summary(quantized_record())
    line = next(line for line in words.splitlines() if line.startswith("quantized"))
    assert "0.100 ms" in line
    assert f"{BF16_MS[0] / FAST_MS['openvino'][0]:.2f}×" in line
    assert "best engine" in words
    assert "best engine" not in summary(full_record()).splitlines()[0]


def test_beside_a_teacher_and_with_pruning(tmp_path):
    folder = make_quantized_run(tmp_path / "run", pruned=True)
    _, markdown = read(folder)
    assert "What pruning did" in markdown
    assert "What quantization did" in markdown
    assert "Sentence number 1 of this unstructured run." in markdown
    said = verdict(quantized_record(teacher=True)).sentence
    assert "of the teacher's acc" in said


def test_figures(fast, mixed):
    names = [{path.name for path in (folder / "figures").iterdir()} for folder, _, _ in (fast, mixed)]
    assert {"engines.png", "quantization.png", "gains.png"} <= names[0] & names[1]
    assert "bits.png" in names[1]
    assert "bits.png" not in names[0]  # all layers are alike
    assert not {"latency.png", "quality.png"} & names[0]
    before, after = fast[2].split("## Before and after")
    assert "figures/engines.png" in before
    assert "figures/engines.png" not in after


def test_a_dot_for_each_engine_and_a_bar_for_its_size():
    record = quantized_record()
    with style.look():
        figure = draw_engines(record)
    first, second, sizes = figure.axes
    expected = {ms[0] for ms in (*FLOAT_MS.values(), *FAST_MS.values(), *EAGER_MS.values(), BF16_MS, (1.7, 12.5))}
    dots = {round(float(dot.get_offsets()[0][0]), 6) for dot in first.collections}
    assert dots == expected
    assert len(second.collections) == len(first.collections)
    widths = sorted(bar.get_width() for bar in sizes.patches)
    assert widths[0] == pytest.approx(62.0)
    assert "▸ OpenVINO int8" in texts(figure)


def test_bits_and_costs_of_each_layer():
    record = quantized_record(mixed=True)
    with style.look():
        figure = draw_bits(record)
        assert draw_bits(quantized_record()) is None
    costs, bits = figure.axes
    assert [round(bar.get_width(), 6) for bar in costs.patches] == [0.031, 0.002, 0.0004, 0.0001]
    assert [bar.get_width() for bar in bits.patches] == [32, 8, 4, 4]


def test_quality_sparsity_and_bits_share_their_steps(tmp_path):
    folder = make_quantized_run(tmp_path / "run", pruned=True)
    record, tables = quantized_record(pruned=True), run_metrics(folder)
    with style.look():
        figure = draw_steps(record, tables)
        assert draw_steps(record | {"stages": []}, tables) is None
    above, sparsity, bits = figure.axes
    assert above.get_xlim() == sparsity.get_xlim() == bits.get_xlim()
    line = bits.lines[0]
    assert list(line.get_xdata()[:2]) == [0, 300]
    expected = record["quantization"]["totals"]["weight_bits"]
    assert np.allclose(line.get_ydata(), [32.0, expected, expected])


def test_a_run_that_did_not_quantize_has_none_of_this(tmp_path):
    folder = make_run(tmp_path / "run")
    html, markdown = read(folder)
    for words in ("What quantization did", "quantized", "What to deploy", "float /"):
        assert words not in html
        assert words not in markdown
    assert not (folder / "figures" / "engines.png").exists()


CHOICES = [
    {},
    {"times": SLOW_MS, "bf16": None},
    {"mixed": True, "method": "post_training", "baseline": False},
    {"pruned": True},
    {"teacher": True},
    {"acc": 0.90},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_schema_knows_the_quantization_part(choice):
    record = json.loads(json.dumps(quantized_record(**choice)))
    jsonschema.Draft202012Validator(record_schema()).validate(record)
    assert list(problems(record, record_schema())) == []


def test_records_without_and_with_null_stay_valid():
    for record in (full_record(), full_record() | {"quantization": None, "recommendation": None}):
        assert list(problems(json.loads(json.dumps(record)), record_schema())) == []


@pytest.mark.parametrize(
    "broken",
    [
        lambda record: record["quantization"].pop("sentences"),
        lambda record: record["quantization"]["layers"][0].update(weight_bits=0),
        lambda record: record["quantization"]["totals"].update(share=1.5),
        lambda record: record["quantization"].update(method=""),
        lambda record: record["recommendation"].pop("why"),
        lambda record: record["recommendation"]["batches"][0].update(ratio=0),
        lambda record: record["deployed"][0]["gains"][0].update(over_best_fp32=None),
        lambda record: record["deployed"][0].update(precision=8),
        lambda record: record["comparison"]["quantized"][0].pop("engine"),
    ],
)
def test_a_broken_part_breaks_the_schema(broken):
    record = json.loads(json.dumps(quantized_record()))
    broken(record)
    assert list(problems(record, record_schema()))
    assert not jsonschema.Draft202012Validator(record_schema()).is_valid(record)


def test_hostile_names_are_only_text(tmp_path):
    record = quantized_record()
    found = record["quantization"]
    for place, name in enumerate(HOSTILE):
        row = copy.deepcopy(found["layers"][0]) | {"name": name, "kind": name, "weight": name, "float_reason": name}
        found["layers"].append(row | {"sensitivity": 0.1 * place})
        found["sentences"].append(name)
        found["refused"].append({"name": name, "reason": name})
        found["reasons"][f"{name}{place}"] = name
    record["recommendation"]["why"] = HOSTILE[0]
    for place, entry in enumerate(record["deployed"]):
        entry["precision"] = HOSTILE[place]
    folder = make_run(tmp_path / "run", rename(record, "ONNX Runtime", HOSTILE[0]))
    html, markdown = render(folder)
    page = html.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'(?i)(src|href)="(?!data:)', page)
    assert "<script" not in markdown.read_text(encoding="utf-8")
    assert not set("\x00\x07\x1b\u202e\u2066") & set(page)
