"""Two processes do what one does with the doubled batch: same curve, one run folder, one log, one record."""

import csv
import os
import signal
import subprocess
import sys

import pytest
from warm import ROOT, TIMEOUT_S, run, wait_for, warm

from lightning_opt.reporting import read_record
from lightning_opt.testing import compare_checkpoints

# No batch norm, whose statistics are each rank's own; with a projector, which ddp must average like the student.
JOB = [
    "+experiment=distill",
    "data=synthetic_images",
    "data.num_train=128",
    "data.num_eval=33",  # odd: one rank has a sample more
    "data.size=8",
    "model=mlp",
    "model.input_shape=[3,8,8]",
    "model.hidden=[16]",
    "teacher.model._target_=lightning_opt.models.MLP",
    "teacher.model.input_shape=[3,8,8]",
    "teacher.model.hidden=[32]",
    "teacher.train.max_epochs=2",
    "teacher.train.data=null",
    "teacher.cache=null",
    "loss=[kd,fitnets]",
    "~loss.terms.fitnets.loss.layers",
    "+loss.terms.fitnets.loss.layers={layers.0: layers.0}",
    "loss.task_weight=0.5",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoints.every_n_steps=2",
    "baseline=false",
    "benchmark=false",
    "export=false",
]
TWO = [*JOB, "data.batch_size=8", "trainer.devices=2", "strategy=ddp"]
TERMS = ("train/loss", "train/loss_kd", "train/loss_fitnets", "train/loss_task", "val/loss", "test/loss", "test/acc")


def curve(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def two(place):
    out = run(*TWO, f"run_dir={place / 'two'}", cwd=place, cache=place / "cache")
    assert out.returncode == 0, out.stderr
    return place / "two", out


@pytest.fixture(scope="module")
def one(place, two):
    out = warm(*JOB, "data.batch_size=16", f"run_dir={place / 'one'}", cwd=place, cache=place / "cache")
    assert out.returncode == 0, out.stderr
    return place / "one", out


@pytest.mark.support(method=["distil_logit", "distil_feature"], strategy="ddp", feature="loss")
def test_curve_is_that_of_one_process_with_the_doubled_batch(one, two):
    for name in TERMS:
        expected = curve(one[0], name)
        assert len(expected) == (24 if name.startswith("train") else 3 if name.startswith("val") else 1)
        assert curve(two[0], name) == pytest.approx(expected, rel=1e-5, abs=1e-5), name


def test_teacher_is_the_one_of_one_process(one, two, place):
    """The whole batch counts, not each rank's share: the second run found the first one's teacher."""
    assert len(list((place / "cache" / "teachers").glob("*/fit.json"))) == 1
    assert "teacher: training" in two[1].stderr
    assert "teacher: training" not in one[1].stderr


def test_both_ranks_share_one_folder_one_log_one_record(one, two):
    folder, out = two
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in one[0].iterdir())
    log = (folder / "train.log").read_text()
    assert log.count("distilled student: training in") == 1
    assert log.count("epoch 3/3") == 1
    assert out.stderr.count("distilled student: test") == 1
    record = read_record(folder)
    assert record["status"] == "finished"
    assert record["models"]["student"]["quality"]["acc"] == curve(folder, "test/acc")[0]
    assert list(folder.rglob("record*.json")) == [folder / "record.json"]


@pytest.mark.support(method=["distil_logit", "distil_feature"], strategy="ddp", feature="resume")
def test_killed_job_of_two_ends_bit_equal(two, place):
    folder = place / "killed"
    words = [*TWO, f"run_dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LIGHTNING_OPT_CACHE": str(place / "cache")},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: (folder / "checkpoints" / "last.ckpt").exists() or process.poll() is not None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    assert not (folder / "fit.json").exists(), "it was over before it was killed: the test tests nothing"
    out = run(*words, cwd=place, cache=place / "cache")
    assert out.returncode == 0, out.stderr
    assert "going on from" in out.stderr
    for name in ("last.ckpt", "best.ckpt"):
        assert compare_checkpoints(two[0] / "checkpoints" / name, folder / "checkpoints" / name) == []
    assert (folder / "metrics.csv").read_text() == (two[0] / "metrics.csv").read_text()


PROBE = """
import os, pathlib, torch
from lightning_opt.models import MLP

class Probe(MLP):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        said = [os.environ.get("LOCAL_RANK", "0"), arguments["hidden"], torch.initial_seed()]
        name = f"{os.environ.get('LIGHTNING_OPT_RUN_DIR', 'none').rpartition('/')[2]}-{os.getpid()}"
        with (pathlib.Path(os.environ["SEEN"]) / name).open("a") as file:
            print(*said, file=file)
"""


def sweep(place, *choices):
    """Run a sweep of jobs of two ranks; return, for each job, what each rank built its model with."""
    seen = place / "seen"
    seen.mkdir()
    (place / "probe.py").write_text(PROBE)
    words = [word for word in TWO if not word.startswith(("+experiment", "teacher", "loss", "~", "+loss"))]
    out = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *words, "model._target_=probe.Probe", *choices, "run_root=runs"],
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT_S,
        cwd=place,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "LIGHTNING_OPT_CACHE": str(place / "cache"),
            "SEEN": str(seen),
        },
    )
    assert out.returncode == 0, out.stderr
    jobs = {}
    for path in seen.iterdir():
        folder = path.name.rpartition("-")[0]
        if folder != "none":  # what was built before the job had a folder: the rehearsal
            last = path.read_text().splitlines()[-1].split(maxsplit=1)
            jobs.setdefault(folder, {})[last[0]] = last[1]
    return jobs


def assert_ranks_agree(place, jobs, count):
    folders = [path.parent for path in (place / "runs").rglob("record.json")]
    assert len(folders) == len(jobs) == count
    assert all(read_record(folder)["status"] == "finished" for folder in folders)
    assert [sorted(ranks) for ranks in jobs.values()] == [["0", "1"]] * count
    assert all(ranks["0"] == ranks["1"] for ranks in jobs.values())
    assert len({ranks["0"] for ranks in jobs.values()}) == count, "two jobs had the same values"
    logs = [(folder / "train.log").read_text().count("training in") for folder in folders]
    assert logs == [1] * count


@pytest.mark.slow
@pytest.mark.timeout(4 * TIMEOUT_S)
def test_every_rank_of_a_grid_of_two_by_two_trains_with_the_values_of_its_job(tmp_path):
    assert_ranks_agree(tmp_path, sweep(tmp_path, "model.hidden=[16],[8]", "seed=1,2"), 4)
