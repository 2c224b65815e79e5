"""The wheel works without the checkout: built, installed into an environment of its own, used in an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from warm import ROOT

from lightning_opt.reporting import read_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def call(*words, cwd, timeout_s=600, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout_s,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # Building writes build/ and an egg-info: not into the checkout.
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out = call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, cwd=folder)
    if out.returncode != 0 and "No matching distribution" in out.stdout + out.stderr:
        pytest.skip("the build backend cannot be fetched here")
    assert out.returncode == 0, out.stderr
    return next(folder.glob("lightning_opt-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel; the dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    )
    out = call(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel), cwd=folder
    )
    assert out.returncode == 0, out.stderr
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = call(python, "-c", "import lightning_opt; print(lightning_opt.__file__)", cwd=folder).stdout
    assert where.startswith(str(purelib)), "the checkout shadows the wheel"
    return folder / "bin" / "lightning-opt"


def test_wheel_holds_every_option_and_no_test(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    options = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name.removeprefix("lightning_opt/conf/") for name in names if "/conf/" in name} >= options
    assert "lightning_opt/py.typed" in names
    assert "lightning_opt/reporting/record.schema.json" in names
    assert not [name for name in names if name.startswith(("tests/", "experiments/"))]
    assert all(name.startswith("lightning_opt") for name in names)


def test_help_names_the_options(installed, tmp_path):
    out = call(installed, "--help", cwd=tmp_path)
    assert out.returncode == 0
    assert "train" in out.stdout
    out = call(installed, "train", "--help", cwd=tmp_path)
    assert "distill_text" in out.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_an_empty_folder(installed, tmp_path):
    words = ["data=digits", "model=mlp", "model.input_shape=[1,8,8]", "model.hidden=[8]", "trainer.max_epochs=1"]
    words += ["benchmark=false", "export=false", "run_dir=run"]
    out = call(installed, "train", "+experiment=supervised", *words, cwd=tmp_path, LIGHTNING_OPT_CACHE=str(tmp_path))
    assert out.returncode == 0, out.stderr
    assert read_record(tmp_path / "run")["status"] == "finished"
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    out = call(installed, "evaluate", "run_dir=run", cwd=tmp_path, LIGHTNING_OPT_CACHE=str(tmp_path))
    assert out.returncode == 0, out.stderr
    out = call(installed, "train", "experiment=distil", cwd=tmp_path)
    assert out.returncode == 2
    assert "distill" in out.stderr
