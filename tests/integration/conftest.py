"""Runs that several tests look at, made once."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from warm import run

# A whole run of a few seconds: teacher on demand, the student alone, the distilled student, measured and exported.
TINY_DISTILL = [
    "+experiment=distill",
    "data=digits",
    "model.image_size=8",
    "model.widths=[4,8]",
    "teacher.model.image_size=8",
    "teacher.model.widths=[8,16]",
    "teacher.train.max_epochs=2",
    "trainer.max_epochs=3",
    "trainer.log_every_n_steps=5",
    "benchmark.max_seconds=0.2",
    "benchmark.rounds=20",
    "benchmark.batch_sizes=[1,8]",
    "benchmark.engines=[torch]",
    "export.formats=[safetensors,onnx]",
]


@dataclass(frozen=True)
class Made:
    """A finished run and what it said."""

    folder: Path
    words: list[str]
    cwd: Path
    cache: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One cache for all, so that the tiny teacher is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def distilled(tmp_path_factory, cache):
    pytest.importorskip("onnxruntime")
    cwd = tmp_path_factory.mktemp("distilled")
    words = [*TINY_DISTILL, f"run_dir={cwd / 'run'}"]
    out = run(*words, cwd=cwd, cache=cache)
    assert out.returncode == 0, out.stderr
    return Made(folder=cwd / "run", words=words, cwd=cwd, cache=cache, stdout=out.stdout, stderr=out.stderr)
