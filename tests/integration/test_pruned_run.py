"""Runs that prune: what they leave, how they go on, what can be made of them, and what is refused."""

import importlib.util
import json
import shutil
import signal

import pytest
import torch
from warm import ROOT, Started, wait_for, warm

import lightning_opt
from lightning_opt.checkpointing import load_primitives
from lightning_opt.reporting import read_record

spec = importlib.util.spec_from_file_location("resume_kill", ROOT / "experiments" / "resume_kill" / "run.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

# Channels leave the model in mid-fit, then single weights are masked, in one fit that also draws random numbers.
JOB = [
    "+experiment=prune_structured",
    "data=digits",
    "data.variants=4",
    "data.augment={_target_: lightning_opt.data.RandomShift, pixels: 1}",
    "model.image_size=8",
    "model.widths=[8,16]",
    "model.hidden=16",
    "pruner.pattern.round_to=1",
    "+pruner@callbacks.zeros=magnitude",
    "callbacks.zeros.sparsity=0.5",
    "callbacks.zeros.start=0.5",
    "callbacks.zeros.end=0.8",
    "trainer.max_epochs=4",
    "trainer.log_every_n_steps=5",
    "callbacks.checkpoints.every_n_steps=7",
    "benchmark=false",
    "export=false",
]


def go(folder, cache, *words):
    return warm(*JOB, *words, f"run_dir={folder}", cwd=folder.parent, cache=cache)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("pruned")
    out = go(place / "run", place / "cache")
    assert out.returncode == 0, out.stderr
    return place


@pytest.fixture
def again(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole / "run", folder)
    return folder


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def is_shrunk(folder):
    return last(folder).exists() and bool(load_primitives(last(folder)).get("recipes"))


def test_record_and_artifact_hold_the_smaller_model(whole):
    record = read_record(whole / "run")
    dense, pruned = record["models"]["baseline"], record["models"]["student"]
    assert pruned["params"] < 0.6 * dense["params"]
    assert pruned["params_nonzero"] < 0.6 * pruned["params"]
    assert dense["params_nonzero"] > 0.99 * dense["params"]
    assert [edit["op"] for edit in record["recipe"]] == ["shrink"]
    assert json.loads((whole / "run" / "artifact" / "recipe.json").read_text()) == record["recipe"]
    model = lightning_opt.load(whole / "run")
    assert sum(p.numel() for p in model.parameters()) == pruned["params"]
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert record["pruning"]


def test_only_the_final_form_was_ever_best(whole):
    best = load_primitives(whole / "run" / "checkpoints" / "best.ckpt")
    assert best["recipes"]
    assert best["global_step"] >= 0.8 * load_primitives(last(whole / "run"))["global_step"]


def test_killed_before_and_after_the_shrink_ends_bit_equal(whole, tmp_path):
    folder = tmp_path / "run"
    for name, happened in {
        "before": lambda: last(folder).exists(),
        "after": lambda: is_shrunk(folder),
    }.items():
        process = Started([*JOB, f"run_dir={folder}"], cwd=tmp_path, cache=whole / "cache")
        wait_for(happened, process=process)
        process.signal(signal.SIGKILL)
        assert process.end().returncode == -signal.SIGKILL
        assert not (folder / "fit.json").exists(), f"the run was over before it was killed {name} the shrink"
    out = go(folder, whole / "cache")
    assert out.returncode == 0, out.stderr
    assert "going on from" in out.stderr
    assert study.differences(whole / "run", folder) == []


def test_comparison_tells_another_sparsity(whole, tmp_path):
    out = go(tmp_path / "run", whole / "cache", "callbacks.zeros.sparsity=0.6")
    assert out.returncode == 0, out.stderr
    assert study.differences(whole / "run", tmp_path / "run")


def test_finished_fits_are_read_back_with_their_structure(again, whole):
    """Killed while it measured: both models are read from their checkpoints."""
    before = read_record(again)
    record = json.loads((again / "record.json").read_text())
    (again / "record.json").write_text(json.dumps(record | {"status": "running", "finished": None}))
    shutil.rmtree(again / "artifact")
    out = go(again, whole / "cache")
    assert out.returncode == 0, out.stderr
    after = read_record(again)
    assert "training in" not in out.stderr
    for name, model in before["models"].items():
        assert after["models"][name]["params"] == model["params"]
        assert after["models"][name]["quality"] == model["quality"]
    assert after["recipe"] == before["recipe"]
    assert after["stages"] == before["stages"]


def test_a_pruned_run_can_be_started_from(whole, tmp_path):
    words = ["data=digits", "model=lenet", "model.image_size=8", "model.widths=[8,16]", "model.hidden=16"]
    words += ["trainer.max_epochs=1", "optimizer.lr=1e-9", "benchmark=false", "export=false", "run_dir=more"]
    out = warm(*words, f"start_from={whole / 'run'}", cwd=tmp_path, cache=whole / "cache")
    assert out.returncode == 0, out.stderr
    source, went_on = read_record(whole / "run"), read_record(tmp_path / "more")
    assert went_on["recipe"] == source["recipe"]
    assert went_on["models"]["student"]["params"] == source["models"]["student"]["params"]
    quality = [record["models"]["student"]["quality"]["acc"] for record in (source, went_on)]
    assert quality[1] == pytest.approx(quality[0], abs=0.02)
    wrong = warm(*words, f"start_from={whole / 'run'}", "model.widths=[4,8]", cwd=tmp_path, cache=whole / "cache")
    assert wrong.returncode == 2, wrong.stderr


def test_a_pruned_run_is_judged_from_its_folder_alone(again):
    out = warm("evaluate", f"run_dir={again}", cwd=again.parent, cache=again.parent / "cache")
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["acc"] == pytest.approx(read_record(again)["models"]["student"]["quality"]["acc"])


REFUSED = {
    "pruner.sparsity=1.5": "pruner.sparsity",
    "pruner.sparsty=0.5": "pruner.sparsity",
    "pruner.include=[stagez.0]": "stages.0",
    "pruner.end=0.05": "end=0.05",
    "pruner.shrink_at=2.0": "shrink_at",
    "pruner.end='9 epochs'": "epochs",
    "pruner.sparsity=0.99": "sparsity",
    "start_from=nowhere": "start_from",
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_cannot_work_is_refused_before_any_training(word, tmp_path, whole):
    out = go(tmp_path / "run", whole / "cache", word)
    assert out.returncode == 2, out.stderr
    assert "Traceback" not in out.stderr
    assert REFUSED[word] in out.stderr
    assert not (tmp_path / "run" / "baseline" / "checkpoints").exists()
    error = out.stderr[out.stderr.index("lightning-opt: ") :].strip().splitlines()
    assert len(error) <= 3
