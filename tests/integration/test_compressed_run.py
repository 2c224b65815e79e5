"""Distil, prune, shrink and quantize in one fit: killed at each edge, on two ranks, and what is left of it."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from warm import ROOT, TIMEOUT_S, Started, run, wait_for, warm

import lightning_opt
from lightning_opt.checkpointing import load_primitives
from lightning_opt.reporting import read_record
from lightning_opt.surgery import Recipe
from lightning_opt.testing import compare_checkpoints

spec = importlib.util.spec_from_file_location("resume_kill", ROOT / "experiments" / "resume_kill" / "run.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

JOB = [
    "+experiment=compress",
    "data=digits",
    "data.batch_size=32",
    "model.image_size=8",
    "model.widths=[8,16]",
    "model.hidden=16",
    "teacher.model.image_size=8",
    "teacher.model.widths=[4]",
    "teacher.train.max_epochs=1",
    "teacher.cache.average_versions=2",
    "pruner.pattern.round_to=1",
    "trainer.max_epochs=5",
    "trainer.log_every_n_steps=5",
    "callbacks.checkpoints.every_n_steps=5",
    "benchmark=false",
    "export=false",
]
TWO = [*JOB, "data.batch_size=16", "trainer.devices=2", "trainer.accelerator=cpu", "strategy=ddp", "baseline=false"]


def ops(folder):
    """Return the edits of the newest checkpoint; empty before there is one."""
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        return []
    texts = (load_primitives(last).get("recipes") or {}).values()
    return [edit.op for text in texts for edit in Recipe.from_json(text)]


def is_frozen(folder):
    last = folder / "checkpoints" / "last.ckpt"
    return last.exists() and any("settled" in state and state["settled"] for state in quantizers(load_primitives(last)))


def quantizers(checkpoint):
    return [state for key, state in checkpoint["callbacks"].items() if key.startswith("Quantize")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("compressed")
    out = warm(*JOB, f"run_dir={place / 'run'}", cwd=place, cache=place / "cache")
    assert out.returncode == 0, out.stderr
    return place


def test_record_and_artifact_hold_the_small_integer_model(whole):
    record = read_record(whole / "run")
    assert [edit["op"] for edit in record["recipe"]] == ["quantize", "shrink", "quantize_on", "convert"]
    assert json.loads((whole / "run" / "artifact" / "recipe.json").read_text()) == record["recipe"]
    models = record["models"]
    assert models["student"]["params"] < 0.6 * models["baseline"]["params"]
    assert models["student"]["size_bytes"] < 0.4 * models["baseline"]["size_bytes"]
    assert {"distillation", "prune", "quantize"} <= {stage["method"] for stage in record["stages"]}
    model = lightning_opt.load(whole / "run")
    assert {value.dtype for value in model.state_dict().values()} >= {torch.int8}
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.support(method=["structured", "qat"], strategy="one", feature="resume")
def test_killed_at_each_edge_ends_bit_equal(whole, tmp_path):
    folder = tmp_path / "run"
    edges = {
        "before anything": lambda: (folder / "checkpoints" / "last.ckpt").exists(),
        "after the shrink": lambda: "shrink" in ops(folder),
        "while rounding": lambda: "quantize_on" in ops(folder),
        "after ranges are final": lambda: is_frozen(folder),
    }
    for name, happened in edges.items():
        process = Started([*JOB, f"run_dir={folder}"], cwd=tmp_path, cache=whole / "cache")
        wait_for(happened, process=process)
        process.signal(signal.SIGKILL)
        assert process.end().returncode == -signal.SIGKILL
        assert not (folder / "fit.json").exists(), f"the run was over before it was killed {name}"
    out = warm(*JOB, f"run_dir={folder}", cwd=tmp_path, cache=whole / "cache")
    assert out.returncode == 0, out.stderr
    assert study.differences(whole / "run", folder) == []
    ended, straight = (read_record(each)["models"]["student"]["quality"] for each in (folder, whole / "run"))
    assert ended == straight


def test_comparison_tells_another_scheme(whole, tmp_path):
    words = [*JOB, "quantizer.scheme=w4a8", f"run_dir={tmp_path / 'run'}"]
    out = warm(*words, cwd=tmp_path, cache=whole / "cache")
    assert out.returncode == 0, out.stderr
    assert study.differences(whole / "run", tmp_path / "run")


def test_killed_after_conversion_gives_the_same_artifact(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole / "run", folder)
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"status": "running", "finished": None}))
    before = (folder / "artifact" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "artifact")
    out = warm(*JOB, f"run_dir={folder}", cwd=tmp_path, cache=whole / "cache")
    assert out.returncode == 0, out.stderr
    assert "training in" not in out.stderr
    assert (folder / "artifact" / "model.safetensors").read_bytes() == before


@pytest.mark.support(method=["structured", "qat"], strategy="ddp", feature="resume")
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_pair_of_ranks_ends_bit_equal(whole, tmp_path):
    straight, folder = tmp_path / "straight", tmp_path / "killed"
    out = run(*TWO, f"run_dir={straight}", cwd=tmp_path, cache=whole / "cache")
    assert out.returncode == 0, out.stderr
    assert [edit["op"] for edit in read_record(straight)["recipe"]] == ["quantize", "shrink", "quantize_on", "convert"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TWO, f"run_dir={folder}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(whole / "cache")},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: "quantize_on" in ops(folder) or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    assert not (folder / "fit.json").exists(), "it was over before it was killed: the test tests nothing"
    out = run(*TWO, f"run_dir={folder}", cwd=tmp_path, cache=whole / "cache")
    assert out.returncode == 0, out.stderr
    for name in ("last.ckpt", "best.ckpt"):
        assert compare_checkpoints(straight / "checkpoints" / name, folder / "checkpoints" / name) == []
    assert (folder / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_what_would_be_cut_under_running_quantizers_is_refused(tmp_path):
    out = warm(*JOB, "quantizer.start=0.3", f"run_dir={tmp_path / 'run'}", cwd=tmp_path, cache=tmp_path / "cache")
    assert out.returncode == 2
    assert "pruner.end=0.45 and quantizer.start=0.3" in out.stderr
    assert not (tmp_path / "run").exists()
