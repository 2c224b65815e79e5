"""Sweeps by the command line: one folder a job, resumed by the same command, the same values on every rank."""

import json
import os
import signal

import pytest
from warm import Started, run, wait_for, warm

from lightning_opt.reporting import read_record
from lightning_opt.reporting.sweeps import read_sweep

JOB = [
    "data=synthetic_images",
    "data.num_train=64",
    "data.num_eval=32",
    "data.size=8",
    "data.batch_size=16",
    "model=mlp",
    "model.input_shape=[3,8,8]",
    "model.hidden=[16]",
    "trainer.max_epochs=3",
    "trainer.accelerator=cpu",
    "benchmark=false",
    "export=false",
]
SPY = """
import json
from pathlib import Path

import lightning.pytorch as pl


class Spy(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        said = {"lr": trainer.optimizers[0].param_groups[0]["initial_lr"], "ranks": trainer.world_size}
        place = Path(trainer.default_root_dir) / f"rank-{trainer.global_rank}.json"
        place.write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweeps")
    (place / "spy.py").write_text(SPY)
    return place


def trials(folder):
    """Return what a study holds, read by Optuna itself."""
    import optuna

    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'optuna.db'}")
    return [(trial.state.name, trial.params, trial.values) for trial in study.trials]


def killed(words, when, *, cwd, cache):
    """Start a command and kill it, with all that it started, once something has happened."""
    started = Started([*words], cwd=cwd, cache=cache)
    try:
        wait_for(when, process=started)
    finally:
        os.killpg(started.process.pid, signal.SIGKILL)
        started.end()


def status(folder):
    return read_record(folder)["status"] if (folder / "record.json").is_file() else None


def test_grid_killed_goes_on_skips_what_is_done_and_outlives_a_job_that_fails(place, cache):
    folder = place / "grid"
    words = ["-m", *JOB, "optimizer.lr=0.01,1e30", "seed=1,2", f"sweep_dir={folder}"]
    done = folder / "optimizer.lr-0.01__seed-1"
    killed(words, lambda: status(done) == "finished", cwd=place, cache=cache)
    finished_at = (done / "record.json").stat().st_mtime_ns
    out = warm(*words, cwd=place, cache=cache)
    assert out.returncode == 5, out.stderr  # a loss that is no number
    assert (done / "record.json").stat().st_mtime_ns == finished_at
    names = {f"optimizer.lr-{rate}__seed-{seed}" for rate in ("0.01", "1e+30") for seed in (1, 2)}
    assert {path.name for path in folder.iterdir() if (path / ".hydra").is_dir()} == names
    sweep = read_sweep(folder)
    assert [point.status for point in sweep.points] == ["finished", "finished", "failed", "failed"]
    assert "sweep: 4 jobs: 2 finished, 2 failed" in out.stderr
    report = (folder / "report.md").read_text()
    assert "optimizer.lr=0.01 seed=2" in report
    assert (done / "train.log").read_text().count("training in") == 1
    assert "seed=1" in (done / ".hydra" / "command.txt").read_text()


@pytest.mark.slow  # two starts of Python; the processes themselves: tests/config/test_config_sweeps_processes.py
def test_jobs_side_by_side_overlap_and_have_their_share_of_threads(place, cache):
    folder = place / "beside"
    words = ["-m", *JOB, "seed=1,2", "sweep.n_jobs=2", "sweep.threads=1", f"sweep_dir={folder}"]
    out = warm(*words, cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert [point.status for point in read_sweep(folder).points] == ["finished", "finished"]
    starts = [read_record(folder / f"seed-{seed}")["started"] for seed in (1, 2)]
    ends = [read_record(folder / f"seed-{seed}")["finished"] for seed in (1, 2)]
    assert max(starts) < min(ends), "they ran one after the other"
    assert read_record(folder / "seed-1")["hardware"]["threads"] == 1


def test_search_killed_and_resumed_draws_what_it_would_have_drawn(place, cache):
    pytest.importorskip("sqlalchemy")
    search = [*JOB, "sweep=optuna", "sweep.n_trials=5", "sweep.pruner.n_startup_trials=1"]
    search += ["sweep.pruner.n_warmup_steps=0", "optimizer.lr=tag(log,interval(1e-6,1e-1))", "model.hidden=[8],[16]"]
    whole, cut = place / "whole", place / "cut"
    out = warm("-m", *search, f"sweep_dir={whole}", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr

    def third_has_begun():
        logs = list(cut.glob("*/train.log"))
        return len(logs) == 3 and any("epoch 1/3" in path.read_text() for path in logs)

    killed(["-m", *search, f"sweep_dir={cut}"], third_has_begun, cwd=place, cache=cache)
    assert sum(state == "RUNNING" for state, _, _ in trials(cut)) == 1
    out = warm("-m", *search, f"sweep_dir={cut}", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert trials(cut) == trials(whole)
    states = [state for state, _, _ in trials(whole)]
    assert len(states) == 5
    assert set(states) == {"COMPLETE", "PRUNED"}
    for point in read_sweep(cut).points:
        record = read_record(cut / point.name)
        if point.status == "pruned":
            assert record["status"] == "interrupted"
            assert "behind the other trials" in record["error"]
            assert not (cut / point.name / "fit.json").exists()
    out = warm("-m", *search, f"sweep_dir={cut}", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert len(trials(cut)) == 5
    assert "training in" not in out.stderr


def test_several_objectives_leave_a_front(place, cache):
    pytest.importorskip("sqlalchemy")
    folder = place / "pareto"
    words = ["-m", *JOB, "sweep=optuna_pareto", "sweep/sampler=grid", "sweep.n_trials=3", "model.hidden=[4],[8],[32]"]
    out = warm(*words, "objective=[val,size_bytes]", f"sweep_dir={folder}", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    found = {params["model.hidden"]: values for _, params, values in trials(folder)}
    for hidden, (accuracy, size) in found.items():
        record = read_record(
            folder / next(p.name for p in read_sweep(folder).points if p.values["model.hidden"] == hidden)
        )
        assert (accuracy, size) == (record["best_value"], record["models"]["student"]["size_bytes"])
    assert found["[4]"][1] < found["[8]"][1] < found["[32]"][1]
    assert "[4]" in {point.values["model.hidden"] for point in read_sweep(folder).front}


def test_every_rank_of_a_trial_trains_with_the_same_values(place, cache):
    """Lightning starts the other ranks by running the command again, which is a sweep: here they run the one job."""
    pytest.importorskip("sqlalchemy")
    folder = place / "ranks"
    words = ["-m", *JOB, "trainer.devices=2", "strategy=ddp", "+callbacks.spy._target_=spy.Spy", "sweep=optuna"]
    words += ["sweep.n_trials=2", "sweep/sampler=grid", "sweep.seed=2", "optimizer.lr=1e-6,0.05"]
    words += ["sweep.pruner.n_startup_trials=1", "sweep.pruner.n_warmup_steps=0"]
    before = {path.name for path in place.iterdir()}
    out = run(*words, f"sweep_dir={folder}", cwd=place, cache=cache)
    assert out.returncode == 0, out.stderr
    assert {path.name for path in place.iterdir()} - before <= {"ranks", "__pycache__"}
    jobs = [path for path in folder.iterdir() if (path / ".hydra").is_dir()]
    assert sorted(path.name for path in jobs) == ["optimizer.lr-0.05", "optimizer.lr-1e-06"]
    for path in jobs:
        said = [json.loads((path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        assert said == [{"lr": float(path.name.partition("lr-")[2]), "ranks": 2}] * 2
        assert (path / "train.log").read_text().count("training in") == 1
    found = trials(folder)
    assert [params["optimizer.lr"] for _, params, _ in found] == ["0.05", "1e-06"], (
        "choose a seed that begins with 0.05"
    )
    assert [state for state, _, _ in found] == ["COMPLETE", "PRUNED"]
