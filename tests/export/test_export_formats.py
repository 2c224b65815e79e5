"""Each written file answers as the model does, at other batch sizes and lengths than it was traced with."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt.errors import ConfigError, MissingExtraError
from lightning_opt.export import LatencyPlan, export, exporter, save_artifact, verify_artifact
from lightning_opt.forward import predict

QUICK = LatencyPlan(batch_sizes=(1, 32), rounds=25, min_rounds=20, max_seconds=0.2)


class Reader(nn.Module):
    """Takes keywords and answers with a dict, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask[..., None].float()
        return {"logits": self.head((self.table(input_ids) * weights).sum(1) / weights.sum(1))}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(3, 4, 1)

    def forward(self, left, right):
        return self.bilinear(left, right), left


def texts(batch, length):
    return {
        "input_ids": torch.randint(0, 11, (batch, length)),
        "attention_mask": (torch.arange(length) < length - 1).long().expand(batch, length).contiguous(),
    }


def conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Export one model in all formats into an artifact."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    model, folder = Reader().train(), tmp_path_factory.mktemp("reader")
    save_artifact(folder, model, architecture={"_target_": "my_pkg.Reader"})
    entries = export(model, texts(1, 6), folder, formats="auto", batches=[texts(3, 7), texts(2, 5)], latency=QUICK)
    return model, folder, {entry["format"]: entry for entry in entries}


def test_all_formats_repeat_the_model(reader):
    model, _, entries = reader
    assert list(entries) == ["safetensors", "torch_export", "onnx", "openvino"]
    assert model.training  # handed back in its mode
    for entry in entries.values():
        assert entry["max_abs_diff"] <= 1e-5
        assert entry["argmax_agreement"] == 1.0
        assert entry["reasons"]["quality"] == "not evaluated here"
    assert entries["safetensors"]["max_abs_diff"] == 0.0


def test_entries_say_what_the_record_wants(reader):
    _, folder, entries = reader
    jsonschema = pytest.importorskip("jsonschema")
    from lightning_opt import reporting

    text = (type(folder)(reporting.__file__).parent / "record.schema.json").read_text()
    schema = json.loads(text)
    engines = {
        "safetensors": "torch eager",
        "torch_export": "torch export",
        "onnx": "ONNX Runtime",
        "openvino": "OpenVINO",
    }
    for name, entry in entries.items():
        jsonschema.validate(entry, {"$ref": "#/$defs/deployed", "$defs": schema["$defs"]})
        assert entry["runtime"] == {"engine": engines[name], "threads": torch.get_num_threads(), "dtype": "float32"}
        assert [row["batch"] for row in entry["latency_ms"]] == [1, 32]
        assert all(row["p50"] > 0 and row["p95"] >= row["p50"] and row["p99"] is None for row in entry["latency_ms"])
        assert "p99" in entry["reasons"]["latency_ms"]
        sizes = {"openvino": ["model.xml", "model.bin"]}.get(name, [entry["file"]])
        assert entry["size_bytes"] == sum((folder / file).stat().st_size for file in sizes)


def test_the_onnx_file_stands_alone(reader):
    """Ask ONNX Runtime itself, without anything of this package between."""
    import onnxruntime

    model, folder, _ = reader
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [port.name for port in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [port.name for port in session.get_outputs()] == ["logits"]
    inputs = texts(5, 9)
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    np.testing.assert_allclose(found, predict(model.eval(), inputs).detach().numpy(), atol=1e-5)


def test_the_openvino_file_stands_alone(reader):
    import openvino

    model, folder, _ = reader
    compiled = openvino.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    inputs = texts(5, 9)
    found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
    np.testing.assert_allclose(found, predict(model.eval(), inputs).detach().numpy(), atol=1e-5)


def test_the_manifest_knows_the_files(reader):
    _, folder, _ = reader
    files = verify_artifact(folder)
    assert {"model.safetensors", "model.pt2", "model.onnx", "model.xml", "model.bin"} <= set(files)
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_nothing_is_printed(tmp_path, capfd, caplog):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export(conv(), torch.randn(1, 1, 8, 8), tmp_path, formats=["onnx"], latency=None)
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # no artifact: no manifest


def test_large_weights_go_into_a_fixed_file_beside(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from lightning_opt.export import export_program, write_onnx

    model, x = nn.Linear(64, 64).eval(), torch.randn(3, 64)
    write_onnx(export_program(model, x), tmp_path / "model.onnx", max_inline_bytes=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)
    write_onnx(export_program(model, x), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_export_with_a_free_batch(tmp_path, compiled):
    model = conv().eval()
    expected = model(torch.ones(7, 1, 8, 8))
    if compiled:
        model.compile(backend="eager")
    (entry,) = export(model, torch.randn(1, 1, 8, 8), tmp_path, formats=["torch_export"], latency=None)
    assert entry["max_abs_diff"] <= 1e-6
    assert entry["reasons"]["latency_ms"] == "not timed here"
    program = torch.export.load(tmp_path / "model.pt2")
    assert torch.allclose(program.module()(torch.ones(7, 1, 8, 8)), expected, atol=1e-6)
    assert (model._compiled_call_impl is not None) == compiled


def test_positional_inputs_and_answers_without_classes(tmp_path):
    entries = export(
        Pair(), (torch.randn(1, 3), torch.randn(1, 4)), tmp_path, formats=["safetensors", "torch_export"], latency=None
    )
    for entry in entries:
        assert entry["max_abs_diff"] <= 1e-6
        assert entry["argmax_agreement"] is None
        assert "classes" in entry["reasons"]["argmax_agreement"]


def test_quality_is_asked_of_the_file_where_it_is_wanted(tmp_path):
    model, x = conv().eval(), torch.randn(4, 1, 8, 8)

    def quality(predictor):
        return {"mean": float(predictor(x).mean())}

    (entry,) = export(model, x, tmp_path, formats=["safetensors"], latency=None, quality=quality)
    assert entry["quality"]["mean"] == pytest.approx(model(x).mean().item(), abs=1e-6)
    assert "quality" not in entry["reasons"]


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("onnx", "onnxscript", "export"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_package_is_named_where_it_was_asked_for_and_skipped_by_auto(
    tmp_path, monkeypatch, name, package, extra
):
    for module in ("onnx", "openvino"):
        real = __import__(f"lightning_opt.export.{module}", fromlist=["find_spec"])
        monkeypatch.setattr(real, "find_spec", lambda wanted: None if wanted in ("onnxscript", "openvino") else wanted)
    with pytest.raises(MissingExtraError, match=rf"{package}.*lightning_opt\[{extra}\]") as caught:
        export(conv(), torch.randn(1, 1, 8, 8), tmp_path, formats=["safetensors", name])
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())
    entries = export(conv(), torch.randn(1, 1, 8, 8), tmp_path, formats="auto", latency=None)
    assert [entry["format"] for entry in entries] == ["safetensors", "torch_export"]


def test_an_unknown_format_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="tflite"):
        export(conv(), torch.randn(1, 1, 8, 8), tmp_path, formats=["tflite"])


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


def test_a_model_that_cannot_be_traced_keeps_its_weights_and_says_why(tmp_path):
    with pytest.raises(ConfigError, match="Branching"):
        export(Branching(2, 2), torch.ones(1, 2), tmp_path, formats=["torch_export"])
    entries = {entry["format"]: entry for entry in export(Branching(2, 2), torch.ones(1, 2), tmp_path, formats="auto")}
    assert entries["safetensors"]["max_abs_diff"] == 0.0
    assert entries["torch_export"]["file"] is None
    assert "Branching" in entries["torch_export"]["reasons"]["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_answers_otherwise_is_refused_and_removed(tmp_path, monkeypatch):
    class Wrong(exporter.TorchExportRunner):
        def predict(self, inputs):
            return super().predict(inputs) * 1.5

    monkeypatch.setattr(exporter, "TorchExportRunner", Wrong)
    with pytest.raises(ConfigError, match="does not repeat"):
        export(conv(), torch.randn(2, 1, 8, 8), tmp_path, formats=["torch_export"], latency=None)
    assert not list(tmp_path.iterdir())


def test_answers_that_are_not_numbers_are_refused(tmp_path):
    model = conv()
    nn.init.constant_(model[-1].bias, float("nan"))
    with pytest.raises(ConfigError, match="does not repeat"):
        export(model, torch.randn(2, 1, 8, 8), tmp_path, formats=["safetensors"], latency=None)
