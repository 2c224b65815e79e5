"""What a run leaves: the contract of the run folder, and the commands that take it up again."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from warm import run, warm

from lightning_opt.checkpointing import DurableCheckpointIO
from lightning_opt.forward import predict
from lightning_opt.reporting import read_record

CONTRACT = [
    ".hydra/config.yaml",
    ".hydra/overrides.yaml",
    "record.json",
    "report.html",
    "report.md",
    "metrics.csv",
    "train.log",
    "checkpoints/last.ckpt",
    "checkpoints/best.ckpt",
    "artifact/model.safetensors",
    "artifact/recipe.json",
    "artifact/manifest.json",
    "artifact/model.onnx",
]


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_every_file_of_the_contract_is_there(distilled):
    for name in CONTRACT:
        assert (distilled.folder / name).is_file(), name
    assert list((distilled.folder / "figures").glob("*.png"))
    assert not list(distilled.folder.rglob("*.tmp.*"))


def test_record_fits_the_published_schema(distilled, root):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((root / "lightning_opt" / "reporting" / "record.schema.json").read_text())
    record = json.loads((distilled.folder / "record.json").read_text())
    jsonschema.validate(record, schema)
    assert record["status"] == "finished"
    assert set(record["models"]) == {"teacher", "baseline", "student"}
    for entry in record["models"].values():
        assert next(iter(entry["quality"])) == "acc"
        assert [row["batch"] for row in entry["latency_ms"]] == [1, 8]
    assert {entry["format"] for entry in record["deployed"]} == {"safetensors", "onnx"}
    assert [stage["method"] for stage in record["stages"]] == ["teacher", "supervised", "distillation"]


def test_numbers_of_a_model_are_those_of_the_model(distilled):
    import lightning_opt

    student = lightning_opt.load(distilled.folder)
    entry = read_record(distilled.folder)["models"]["student"]
    assert entry["params"] == sum(parameter.numel() for parameter in student.parameters())
    assert entry["size_bytes"] == (distilled.folder / "artifact" / "model.safetensors").stat().st_size


def test_metrics_csv_holds_each_term_and_each_epoch(distilled):
    rows = list(csv.DictReader((distilled.folder / "metrics.csv").open()))
    assert [int(row["epoch"]) for row in rows if row["val/acc"]] == [0, 1, 2]
    assert all(row["train/loss"] and row["train/loss_kd"] for row in rows if row.get("train/loss"))
    assert [row["test/acc"] for row in rows if row.get("test/acc")], "the test is not in the file"
    fitted = json.loads((distilled.folder / "fit.json").read_text())
    assert float(next(row["test/acc"] for row in rows if row.get("test/acc"))) == fitted["quality"]["acc"]


def test_checkpoints_hold_the_student_alone_as_data(distilled):
    for name in ("last", "best"):
        path = distilled.folder / "checkpoints" / f"{name}.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state
        assert not [key for key in state if "teacher" in key]


ANSWERS = """
import sys, torch, lightning_opt
model = lightning_opt.load(sys.argv[1])
torch.save(model(torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)), sys.argv[2])
assert "hydra" not in sys.modules and "lightning" not in sys.modules
"""


def test_artifact_answers_like_the_best_weights_in_a_fresh_process(distilled, tmp_path):
    """`load` needs neither Lightning nor Hydra, and gives the best weights to the last bit."""
    out = subprocess.run(
        [sys.executable, "-c", ANSWERS, str(distilled.folder), str(tmp_path / "logits.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    best = DurableCheckpointIO().load_checkpoint(distilled.folder / "checkpoints" / "best.ckpt")["state_dict"]
    from lightning_opt.models import LeNet

    model = LeNet(num_outputs=10, image_size=8, widths=[4, 8], stride=2, hidden=None, in_channels=1).eval()
    model.load_state_dict({key.removeprefix("model."): value for key, value in best.items() if "model." in key[:6]})
    with torch.no_grad():
        expected = predict(model, torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8))
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_report_needs_nothing_but_itself(distilled):
    text = (distilled.folder / "report.html").read_text()
    assert len(re.findall(r'src="data:image/', text)) >= 3
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert "url(http" not in text
    assert "@import" not in text
    assert "distilled student" in distilled.stdout


def test_finished_run_is_not_run_again(distilled):
    before = stamps(distilled.folder)
    out = warm(*distilled.words, cwd=distilled.cwd, cache=distilled.cache)
    assert out.returncode == 0, out.stderr
    assert "is finished" in out.stderr
    assert stamps(distilled.folder) == before


def test_other_values_in_the_same_folder_are_refused(distilled):
    before = stamps(distilled.folder)
    out = warm(*distilled.words, "optimizer.lr=0.123", cwd=distilled.cwd, cache=distilled.cache)
    assert out.returncode == 2
    assert "optimizer.lr" in out.stderr
    assert len(out.stderr.strip().splitlines()) <= 3
    assert stamps(distilled.folder) == before


def test_evaluate_gives_the_metrics_of_the_record(distilled, tmp_path):
    out = warm("evaluate", f"run_dir={distilled.folder}", cwd=tmp_path, cache=distilled.cache)
    assert out.returncode == 0, out.stderr
    said = json.loads(out.stdout.strip().splitlines()[-1])
    expected = read_record(distilled.folder)["models"]["student"]["quality"]
    assert said == pytest.approx(expected, abs=1e-6)
    assert list(said) == list(expected)
    assert list(tmp_path.iterdir()) == []


def test_benchmark_measures_runs_side_by_side(distilled, tmp_path):
    other = tmp_path / "copy"
    shutil.copytree(distilled.folder / "artifact", other)
    out = warm(
        *("benchmark", f"run_dir={distilled.folder}", f"beside=[{other}]", "benchmark.batch_sizes=[1]"),
        *("benchmark.max_seconds=0.2", "benchmark.rounds=20", "benchmark.engines=[torch]"),
        cwd=tmp_path,
        cache=distilled.cache,
    )
    assert out.returncode == 0, out.stderr
    measured = json.loads(out.stdout)
    assert set(measured) == {"run", "copy"}
    recorded = read_record(distilled.folder)["models"]["student"]
    for entry in measured.values():
        assert (entry["params"], entry["flops"]) == (recorded["params"], recorded["flops"])
        assert entry["latency_ms"][0]["p50"] > 0


def test_export_writes_the_formats_again(distilled, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(distilled.folder, folder)
    (folder / "artifact" / "model.onnx").unlink()
    out = warm("export", f"run_dir={folder}", "export.formats=[onnx]", cwd=tmp_path, cache=distilled.cache)
    assert out.returncode == 0, out.stderr
    entry = json.loads(out.stdout)[0]
    assert (folder / "artifact" / "model.onnx").is_file()
    assert entry["file"] == "artifact/model.onnx"
    assert entry["max_abs_diff"] < 1e-4
    recorded = read_record(distilled.folder)["models"]["student"]["quality"]
    assert entry["quality"]["acc"] == pytest.approx(recorded["acc"], abs=1e-6)


def test_report_renders_one_run_and_compares_two(distilled, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        shutil.copytree(distilled.folder, folder)
        (folder / "report.html").unlink()
    out = warm("report", folders[0], cwd=tmp_path, cache=distilled.cache)
    assert out.returncode == 0, out.stderr
    assert (folders[0] / "report.html").read_text()
    out = warm("report", *folders, f"out={tmp_path / 'both'}", cwd=tmp_path, cache=distilled.cache)
    assert out.returncode == 0, out.stderr
    text = "".join(path.read_text() for path in (tmp_path / "both").glob("*.html"))
    assert "one" in text
    assert "two" in text


def test_without_run_dir_each_run_gets_a_folder_of_its_own(cache, tmp_path):
    """The second is started as a user does, the first one's folder must not be its."""
    words = ["data=synthetic_images", "data.num_train=32", "data.num_eval=16", "data.size=8", "model=mlp"]
    words += ["model.input_shape=[3,8,8]", "model.hidden=[8]", "trainer.max_epochs=1", "data.batch_size=16"]
    words += ["benchmark=false", "export=false", "task_name=twice"]
    outs = [run(*words, cwd=tmp_path, cache=cache), warm(*words, cwd=tmp_path, cache=cache)]
    assert [out.returncode for out in outs] == [0, 0], outs[0].stderr + outs[1].stderr
    folders = sorted((tmp_path / "runs" / "twice").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-[0-9a-f]{6}", folder.name)
        record = read_record(folder)
        assert record["status"] == "finished"
        assert record["models"]["student"]["latency_ms"] is None
        assert "benchmark=false" in json.dumps(record["models"]["student"]["reasons"])
        assert record["deployed"] == []
