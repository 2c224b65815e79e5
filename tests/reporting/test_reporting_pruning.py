"""The report of a run that pruned: its numbers, its names, its figures, and nothing of it where nothing was pruned."""

import copy
import json
import re

import jsonschema
import matplotlib
import numpy as np
import pytest
from fake_pruned import DENSE_MS, SHRUNK_MS, make_pruned_run, pruned_record, write_pruned_metrics
from fake_run import HOSTILE, full_record, make_run, rename

from lightning_opt.reporting import problems, record_schema, render, run_metrics, style, summary, verdict, write_record
from lightning_opt.reporting.names import model_name
from lightning_opt.reporting.pruned_figures import draw_layers, draw_steps


def texts(figure):
    return [found.get_text() for found in figure.findobj(matplotlib.text.Text) if found.get_text()]


def read(folder):
    html, markdown = render(folder)
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8").replace("\\", "")


def cells(markdown, first):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def zeros(tmp_path_factory):
    folder = make_pruned_run(tmp_path_factory.mktemp("zeros") / "run")
    return folder, *read(folder)


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    folder = make_pruned_run(tmp_path_factory.mktemp("shrunk") / "run", structured=True)
    return folder, *read(folder)


def test_the_models_are_called_dense_and_pruned(zeros):
    _, html, markdown = zeros
    assert cells(markdown.replace("|   |", "| - |"), "-")[1:] == ["dense", "pruned", "dense / pruned"]
    assert "student" not in markdown.split("## Deployed formats")[0].split("## Against the best engine")[0]
    assert "The pruned model keeps 99.4 % of the dense model" in html


def test_beside_a_teacher_there_are_three(tmp_path):
    record = pruned_record(structured=True, teacher=True)
    names = {name: model_name(record, name) for name in record["models"]}
    assert names == {"teacher": "teacher", "baseline": "dense alone", "student": "distilled + pruned"}
    folder = make_pruned_run(tmp_path / "run", structured=True, teacher=True)
    _, markdown = read(folder)
    assert "keeps 96.2 % of the teacher" in markdown
    totals = record["pruning"]["totals"]
    ratio = totals["params_before"] / totals["params"]
    assert f"{ratio:.1f}× fewer parameters" in markdown


def test_each_engine_has_both_models_and_the_ratio(shrunk):
    _, _, markdown = shrunk
    for engine, dense in DENSE_MS.items():
        row = cells(markdown, engine)
        assert row[3] == f"{dense[0] / SHRUNK_MS[engine][0]:.2f}×"
        assert row[6] == f"{dense[1] / SHRUNK_MS[engine][1]:.2f}×"
        assert row[1].startswith(f"{dense[0]:.3f}"[:4])


def test_sizes_in_four_forms(zeros):
    folder, _, markdown = zeros
    sizes = json.loads((folder / "record.json").read_text())["pruning"]["size_bytes"]
    forms = {"dense, as it is": "dense", "bit-mask, fp32 values": "bitmask", "bit-mask, fp16 values": "bitmask_fp16"}
    for words, form in (forms | {"bit-mask, deflated": "compressed"}).items():
        assert cells(markdown, words)[2] == f"{sizes[form] / sizes['before']:.3f}"


def test_layers_with_their_shapes_and_shares(zeros, shrunk):
    row = cells(shrunk[2], "stage1.0.conv1")
    assert row[1:3] == ["32×16×3×3", "16×12×3×3"]
    assert f"{100 * 16 * 12 / (32 * 16):.1f} %" in row
    row = cells(zeros[2], "stage1.0.conv1")
    assert "16×12×3×3" not in row
    assert {"92.0 %", "8.0 %", "unstructured"} <= set(row)


def test_no_speed_is_no_success(zeros, shrunk):
    said = {name: verdict(pruned_record(structured=name == "shrunk")) for name in ("zeros", "shrunk")}
    assert said["zeros"].mood == "mixed"
    assert "is no faster at batch 1" in said["zeros"].sentence
    assert said["shrunk"].mood == "good"
    assert f"is {0.31 / 0.20:.2f}× faster at batch 1" in said["shrunk"].sentence
    assert verdict(pruned_record(structured=True, acc=0.70)).mood == "bad"
    for folder, html, markdown in (zeros, shrunk):
        for sentence in json.loads((folder / "record.json").read_text())["pruning"]["sentences"]:
            assert sentence in html
            assert sentence in markdown.split("## ")[0]


def test_nothing_pruned_is_said(tmp_path):
    record = pruned_record()
    totals = record["pruning"]["totals"]
    totals["nonzero"] = totals["params"]
    record["pruning"] |= {"kind": "none", "kinds": []}
    said = verdict(record)
    assert said.mood == "bad"
    assert "nothing was pruned" in said.sentence


def test_without_a_control_the_cost_in_quality_is_called_unknown(tmp_path):
    folder = make_pruned_run(tmp_path / "run", baseline=False)
    _, markdown = read(folder)
    assert "what pruning cost in quality is not known" in markdown
    assert "dense, untrained" in markdown
    assert cells(markdown, "parameters")[3] == "1.00×"


def test_the_terminal_shows_what_is_not_zero():
    record = pruned_record()
    words = summary(record)
    line = next(line for line in words.splitlines() if line.startswith("pruned"))
    count = record["models"]["student"]["params_nonzero"]
    assert f"{count / 1000:.2f} k" in line
    assert record["pruning"]["sentences"][1] in words
    assert "not zero" not in summary(full_record())


def test_figures(zeros, shrunk):
    for folder, html, markdown in (zeros, shrunk):
        assert {"pruning.png", "layers.png"} <= {path.name for path in (folder / "figures").iterdir()}
        assert "figures/pruning.png" in markdown
        assert "What is left of each layer" in html
        assert not (folder / "figures" / "quality.png").exists()


def test_quality_and_sparsity_share_their_steps(tmp_path):
    record = pruned_record(structured=True)
    write_pruned_metrics(tmp_path / "metrics.csv", final=0.5, shrink_to=29_512)
    tables = run_metrics(tmp_path)
    with style.look():
        figure = draw_steps(record, tables)
    above, below = figure.axes
    assert above.get_xlim() == below.get_xlim()
    line = below.lines[0]
    logged = tables["student"]["student/sparsity"]
    assert set(np.round(100 * logged.value, 6)) <= set(np.round(line.get_ydata(), 6))
    assert line.get_ydata()[-1] == pytest.approx(50.0)
    assert line.get_xdata()[-1] == max(series.step[-1] for series in tables["student"].values())
    assert [words for words in texts(figure) if "parameters" in words] == ["29.5 k parameters"]
    assert "50.0 %" in texts(figure)


def test_without_logged_sparsity_quality_is_drawn_as_ever(tmp_path):
    folder = make_run(tmp_path / "run", pruned_record())
    render(folder)
    assert (folder / "figures" / "pruning.png").exists()
    with style.look():
        assert draw_steps(pruned_record(), run_metrics(folder)) is None


def test_a_bar_for_each_layer():
    record = pruned_record(structured=True)
    with style.look():
        figure = draw_layers(record)
    bars = figure.axes[0].containers
    left = [bar.get_width() for bar in bars[2]]
    assert left == pytest.approx([100 * layer["kept"] for layer in record["pruning"]["layers"]])
    assert {"left", "removed"} <= set(texts(figure))
    assert "zero" not in texts(figure)


def test_many_layers_keep_the_largest_and_sum_up_the_rest(tmp_path):
    record = pruned_record()
    one = record["pruning"]["layers"][0]
    record["pruning"]["layers"] = [
        one | {"name": f"layer{place}.weight", "params_before": 1000 + place, "params": 1000 + place, "nonzero": 10}
        for place in range(75)
    ]
    write_record(tmp_path, record)
    _, markdown = read(tmp_path)
    assert "| layer74 |" in markdown
    assert "| layer20 |" not in markdown
    assert "35 smaller ones" in markdown


def test_a_run_that_did_not_prune_has_none_of_this(tmp_path):
    folder = make_run(tmp_path / "run")
    html, markdown = read(folder)
    for words in ("What pruning did", "pruned", "dense /", "What is left"):
        assert words not in html
        assert words not in markdown
    assert not (folder / "figures" / "layers.png").exists()


@pytest.mark.parametrize("choice", [{}, {"structured": True}, {"teacher": True}, {"baseline": False}])
def test_the_schema_knows_the_pruning_part(choice):
    record = json.loads(json.dumps(pruned_record(**choice)))
    jsonschema.Draft202012Validator(record_schema()).validate(record)
    assert list(problems(record, record_schema())) == []


def test_records_without_and_with_null_stay_valid():
    for record in (full_record(), full_record() | {"pruning": None}):
        assert list(problems(json.loads(json.dumps(record)), record_schema())) == []


@pytest.mark.parametrize(
    "broken",
    [
        lambda found: found.pop("sentences"),
        lambda found: found["layers"][0].update(kept=1.5),
        lambda found: found["latency"][0].update(ratio=0),
        lambda found: found["size_bytes"].update(bitmask=-1),
        lambda found: found.update(kind=""),
        lambda found: found["totals"].update(nonzero="many"),
    ],
)
def test_a_broken_pruning_part_breaks_the_schema(broken):
    record = json.loads(json.dumps(pruned_record()))
    broken(record["pruning"])
    assert list(problems(record, record_schema()))
    assert not jsonschema.Draft202012Validator(record_schema()).is_valid(record)


def test_hostile_names_are_only_text(tmp_path):
    record = pruned_record()
    for place, name in enumerate(HOSTILE):
        record["pruning"]["layers"].append(
            copy.deepcopy(record["pruning"]["layers"][0]) | {"name": name, "zeros": name}
        )
        record["pruning"]["sentences"].append(name)
        record["pruning"]["reasons"][f"{name}{place}"] = name
    folder = make_run(tmp_path / "run", rename(record, "ONNX Runtime", HOSTILE[0]))
    html, markdown = render(folder)
    page = html.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'(?i)(src|href)="(?!data:)', page)
    assert "<script" not in markdown.read_text(encoding="utf-8")
    assert not set("\x00\x07\x1b\u202e\u2066") & set(page)
