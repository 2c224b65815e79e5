"""Bad input from the command line: exit code, at most three lines, nothing created."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*words, cwd, module="train", timeout=120, **env):
    command = [sys.executable, str(ROOT / "train.py")] if module == "train" else [sys.executable, "-m", "lightning_opt"]
    return subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(Path(cwd) / "cache"), **env},
    )


def assert_refused(out, cwd, *says, code=2):
    assert out.returncode == code, out.stdout + out.stderr
    lines = out.stderr.strip().splitlines()
    assert len(lines) <= 3, out.stderr
    assert "Traceback" not in out.stderr
    for text in says:
        assert text in out.stderr
    assert list(Path(cwd).iterdir()) == [], "something was created"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.batchsize=3"], "data.batch_size"),
        (["+data.batchsize=3"], "data.batch_size"),
        (["experiment=distil"], "distill"),
        (["optimizer.lr=abc"], "optimizer.lr"),
        (["data.batch_size=-3"], "at least 1"),
        (["seed"], "seed"),
        (["--config-dir", "nowhere"], "nowhere"),
        (["-m", "data.batch_size=8,-3"], "at least 1"),
    ],
)
def test_refused_before_anything_heavy_is_imported(words, says, tmp_path):
    assert_refused(run(*words, cwd=tmp_path), tmp_path, says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task.num_outputs=7"], "task.num_outputs=7"),
        (
            [
                "+experiment=distill",
                "loss.terms.kd.loss._target_=lightning_opt.losses.KD",
                "teacher.train.max_epochs=0",
            ],
            "max_epochs",
        ),
        (["model._target_=torch.optim.SGD", "~model.widths"], "model"),
    ],
)
def test_refused_by_the_classes_themselves(words, says, tmp_path):
    assert_refused(run(*words, cwd=tmp_path), tmp_path, says)


@pytest.mark.parametrize(
    ("words", "says", "imported"),
    [
        (["model._target_=lightning_opt.models.ConvNet", "model.widths=[]"], "widths", []),
        (["+experiment=distill", "loss=crd", "loss.terms.crd.loss.n_negatives=0"], "n_negatives=0", []),
        (["trainer.accelerator=cuda"], "trainer.accelerator=cuda", []),
        (["+trainer.gradient_clip_algorithm=abc"], "abc", ["lightning", "torchmetrics"]),
    ],
)
def test_refusal_waits_for_no_import_that_it_does_not_need(words, says, imported, tmp_path):
    """Lightning takes longer to import than all the rest together; a model's or a loss's own refusal needs none."""
    code = (
        "import sys, lightning_opt.cli.train as train\n"
        f"code = train.main({words!r})\n"
        "print(code, [name for name in ('lightning', 'torchmetrics') if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert out.stdout.strip() == f"2 {imported}", out.stdout + out.stderr
    assert says in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_group_and_runs_nothing(tmp_path):
    out = run("--help", cwd=tmp_path)
    assert out.returncode == 0
    for word in ("experiment:", "distill", "loss:", "kd", "run_dir"):
        assert word in out.stdout
    assert list(tmp_path.iterdir()) == []


def test_every_command_has_help_and_prints_its_config(tmp_path):
    for command in ("train", "evaluate", "benchmark", "export", "report"):
        out = run(command, "--help", cwd=tmp_path, module="lightning_opt")
        assert out.returncode == 0
        assert "usage" in out.stdout
    out = run("train", "+experiment=distill", "--cfg", "job", cwd=tmp_path, module="lightning_opt")
    assert out.returncode == 0, out.stderr
    assert "task_name: distill" in out.stdout


def test_unknown_command_is_named(tmp_path):
    out = run("trian", cwd=tmp_path, module="lightning_opt")
    assert_refused(out, tmp_path, "trian", "train")


def test_no_run_folder_is_said(tmp_path):
    (tmp_path / "x").mkdir()
    out = run("evaluate", f"run_dir={tmp_path / 'x'}", cwd=tmp_path / "x", module="lightning_opt")
    assert_refused(out, tmp_path / "x", "no run folder")
