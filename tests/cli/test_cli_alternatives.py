"""Other schemes of the same trained model, beside the one that was asked for."""

import json

import pytest

from lightning_opt.cli.alternatives import check_schemes
from lightning_opt.cli.train import main
from lightning_opt.errors import ConfigError

JOB = (
    "+experiment=quantize",
    "data=digits",
    "data.batch_size=256",
    "model=lenet_small",
    "model.image_size=8",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "benchmark=none",
    "callbacks=none",
)


def test_a_scheme_that_is_not_known_is_refused():
    check_schemes({"export": {"schemes": ["w8a8_dynamic", "w4g32"]}})
    check_schemes({"export": False})
    with pytest.raises(ConfigError, match=r"export\.schemes has 'w99'"):
        check_schemes({"export": {"schemes": ["w99"]}})


def test_each_scheme_is_written_and_judged(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = [*JOB, "export.formats=[onnx]", "export.schemes=[w8a8_dynamic,w8]"]
    assert main([*words, f"run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    deployed = {entry["format"]: entry for entry in record["deployed"]}
    assert list(deployed) == ["onnx", "onnx, w8a8_dynamic", "onnx, w8"]
    before = record["models"]["float"]["quality"]["acc"]
    for entry in deployed.values():
        assert (tmp_path / "run" / entry["file"]).is_file()
        assert abs(entry["quality"]["acc"] - before) < 0.05
        assert entry["argmax_agreement"] > 0.95
    assert deployed["onnx, w8"]["precision"] != deployed["onnx"]["precision"]


def test_a_model_that_was_trained_rounded_has_no_alternatives(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = [*JOB, "quantizer=qat", "export.formats=[onnx]", "export.schemes=[w8]"]
    assert main([*words, f"run_dir={tmp_path / 'run'}", f"paths.cache_dir={tmp_path / 'cache'}"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert [entry["format"] for entry in record["deployed"]] == ["onnx"]
