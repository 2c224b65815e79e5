"""A sweep's folder as a report: what is best, what no point beats, and how to get each again."""

import copy
import json
import shlex

import numpy as np
import pytest
from fake_run import HOSTILE, full_record

from lightning_opt.cli import report
from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.reporting import write_record
from lightning_opt.reporting.sweeps import measures_of, non_dominated, read_sweep
from lightning_opt.reporting.sweeps_report import Limits, best_within, render_sweep

AXES = {"model": "mlp,cnn,resnet8x4", "optimizer.lr": "tag(log, interval(1e-4,1e-1))"}


BASE = full_record()


def measured(acc, latency_ms, size_bytes):
    record = copy.deepcopy(BASE)
    student = record["models"]["student"]
    student |= {"quality": {"acc": acc}, "size_bytes": size_bytes}
    student["latency_ms"] = [{"batch": 1, "p50": latency_ms, "p95": latency_ms, "p99": latency_ms}]
    return record | {"best_value": acc - 0.01}


def make_sweep(folder, rows, *, objectives=("val", "latency_ms", "size_bytes"), axes=AXES, method="optuna"):
    """Write a sweep; a row is (values, record or None, error or None)."""
    jobs = []
    for number, (values, record, error) in enumerate(rows):
        name = f"job-{number}"
        (folder / name).mkdir(parents=True)
        if record is not None:
            write_record(folder / name, record)
        command = ["python", "train.py", "+experiment=distill", *(f"{key}={value}" for key, value in values.items())]
        jobs.append({"folder": name, "number": number, "values": values, "command": command, "error": error})
    told = {
        "schema_version": 1,
        "command": "python train.py -m +experiment=distill sweep=optuna_pareto",
        "method": method,
        "fixed": ["+experiment=distill"],
        "axes": axes,
        "objectives": list(objectives),
        "directions": ["maximize" if name.startswith(("val", "test")) else "minimize" for name in objectives],
        "jobs": jobs,
    }
    (folder / "sweep.json").write_text(json.dumps(told))
    return folder


def many(count=16, seed=0):
    """Return rows of a plausible search: larger models are better and slower, too large a rate is bad."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        model = ["mlp", "cnn", "resnet8x4"][draw.integers(3)]
        rate = float(10 ** draw.uniform(-4, -1))
        size = {"mlp": 0, "cnn": 1, "resnet8x4": 2}[model]
        acc = 0.80 + 0.06 * size - 0.03 * (np.log10(rate) + 2.3) ** 2 + draw.normal(0, 0.01)
        record = measured(float(acc), 0.2 * 3**size * float(draw.uniform(0.95, 1.1)), 40_000 * 5**size)
        if number in (7, 12):
            record |= {"status": "failed", "error": "NonFiniteError: loss is nan at step 12"}
        rows.append(({"model": model, "optimizer.lr": repr(rate)}, record, None))
    return rows


@pytest.fixture
def folder(tmp_path):
    return make_sweep(tmp_path / "sweep", many())


def test_front_is_what_a_pairwise_look_finds():
    rows = np.random.default_rng(3).integers(0, 6, size=(40, 3)).astype(float)
    at_most = (rows[:, None, :] <= rows[None, :, :]).all(-1)
    below = (rows[:, None, :] < rows[None, :, :]).any(-1)
    assert non_dominated(rows.tolist()) == (~(at_most & below).any(0)).tolist()


def test_measures_are_those_of_the_student():
    known = measures_of(measured(0.9, 0.5, 1000))
    assert known["test/acc"] == 0.9
    assert known["val"] == pytest.approx(0.89)
    assert (known["latency_ms"], known["size_bytes"]) == (0.5, 1000)


def test_best_and_front_of_a_small_sweep(tmp_path):
    rows = [
        ({"model": "a", "optimizer.lr": "0.1"}, measured(0.90, 2.0, 100), None),
        ({"model": "b", "optimizer.lr": "0.1"}, measured(0.95, 3.0, 300), None),
        ({"model": "c", "optimizer.lr": "0.1"}, measured(0.89, 2.5, 200), None),  # a beats it in all three
        ({"model": "d", "optimizer.lr": "0.1"}, measured(0.80, 1.0, 400), None),
        ({"model": "e", "optimizer.lr": "0.1"}, None, "ended with 2: model=e: there is no such option"),
    ]
    sweep = read_sweep(make_sweep(tmp_path / "small", rows))
    assert [point.values["model"] for point in sweep.ranked] == ["b", "a", "c", "d"]
    assert {point.values["model"] for point in sweep.front} == {"a", "b", "d"}
    assert sweep.points[4].status == "failed"
    assert best_within(sweep, Limits(max_latency_ms=2.0)).values["model"] == "a"
    assert best_within(sweep, Limits(max_size_bytes=250, max_latency_ms=2.6)).values["model"] == "a"
    assert best_within(sweep, Limits(max_latency_ms=1.5)).values["model"] == "d"
    assert best_within(sweep, Limits(min_quality=0.94, max_latency_ms=2.0)) is None


def test_where_less_is_better_min_quality_is_a_most(tmp_path):
    rows = [({"model": str(n), "optimizer.lr": "1"}, measured(acc, 1.0, 10), None) for n, acc in enumerate((0.3, 0.2))]
    place = make_sweep(tmp_path / "loss", rows, objectives=("val",))
    told = json.loads((place / "sweep.json").read_text())
    (place / "sweep.json").write_text(json.dumps(told | {"directions": ["minimize"]}))
    sweep = read_sweep(place)
    assert best_within(sweep, Limits(min_quality=0.25)).values["model"] == "1"
    assert best_within(sweep, Limits(min_quality=0.1)) is None


def test_report_shows_every_point_and_its_command(folder, capsys):
    assert report.main([str(folder), "max_latency_ms=0.7"]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html"), str(folder / "report.md")]
    said = (folder / "report.md").read_text()
    sweep = read_sweep(folder)
    for point in sweep.points:
        assert shlex.join(point.command) in said
    best = best_within(sweep, Limits(max_latency_ms=0.7))
    assert best.values["model"] == "cnn"
    assert "Best with latency of at most 0.700 ms" in said
    assert said.index(shlex.join(best.command)) < said.index("## All points")
    assert "nan at step 12" in said
    html = (folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html.replace("http-equiv", "")
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["front.png", "history.png", "parallel.png"]


def test_one_objective_has_no_front(tmp_path):
    place = make_sweep(tmp_path / "one", many(), objectives=("test/acc",))
    render_sweep(place)
    assert not (place / "figures" / "front.png").exists()
    assert (place / "figures" / "history.png").exists()
    assert "too good" in (place / "report.md").read_text()


def test_grid_without_objectives_is_compared_by_quality_and_by_the_cost_that_differs(tmp_path):
    rows = [({"seed": str(n)}, measured(0.9 + n / 100, 1.0 + n, 500), None) for n in range(3)]
    sweep = read_sweep(make_sweep(tmp_path / "grid", rows, objectives=(), axes={"seed": "0,1,2"}, method="grid"))
    assert sweep.objectives == ("test/acc", "latency_ms")
    assert sweep.directions == ("maximize", "minimize")
    assert sweep.ranked[0].values == {"seed": "2"}


def test_pruned_points_are_named_so_and_are_not_ranked(folder):
    (folder / "job-3" / ".hydra").mkdir()
    (folder / "job-3" / ".hydra" / "pruned.json").write_text("{}")
    sweep = read_sweep(folder)
    assert sweep.points[3].status == "pruned"
    assert "job-3" not in [point.name for point in sweep.ranked]
    render_sweep(folder)
    assert "1 pruned" in (folder / "report.md").read_text()


def test_sweep_that_has_not_begun_is_reported_as_such(tmp_path):
    place = make_sweep(tmp_path / "new", [({"model": "a", "optimizer.lr": "1"}, None, None)])
    render_sweep(place)
    assert "No point has finished yet" in (place / "report.md").read_text()


def test_hostile_names_stay_text(tmp_path):
    values = {words: words for words in HOSTILE}
    rows = [({**values, HOSTILE[0]: str(n)}, measured(0.9 - n / 10, 1.0 + n, 500 + n), HOSTILE[n]) for n in range(3)]
    place = make_sweep(tmp_path / "bad", rows, axes=values)
    render_sweep(place)
    html = (place / "report.html").read_text()
    assert "<script" not in html
    assert "<img src=x" not in html


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b", ""])
def test_job_outside_of_the_sweep_is_refused(folder, name):
    told = json.loads((folder / "sweep.json").read_text())
    told["jobs"][0]["folder"] = name
    (folder / "sweep.json").write_text(json.dumps(told))
    with pytest.raises(StorageError, match="outside"):
        read_sweep(folder)


@pytest.mark.parametrize("words", ["{", "[]", "{}", '{"schema_version": 1, "jobs": 3}'])
def test_damaged_sweep_is_named(folder, words):
    (folder / "sweep.json").write_text(words)
    with pytest.raises(StorageError, match=r"sweep\.json"):
        read_sweep(folder)


def test_newer_sweep_is_refused(folder):
    told = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps(told | {"schema_version": 2}))
    with pytest.raises(ConfigError, match="newer"):
        read_sweep(folder)


def test_limit_of_what_was_not_measured_is_refused(tmp_path):
    record = measured(0.9, 1.0, 10)
    record["models"]["student"] |= {"latency_ms": None}
    record["models"]["student"]["reasons"]["latency_ms"] = "benchmark=false"
    place = make_sweep(tmp_path / "x", [({"model": "a", "optimizer.lr": "1"}, record, None)], objectives=("val",))
    with pytest.raises(ConfigError, match="max_latency_ms=1"):
        render_sweep(place, Limits(max_latency_ms=1))


def test_limit_for_a_plain_run_is_refused(run_dir, capsys):
    assert report.main([str(run_dir), "max_latency_ms=1"]) == 2
    assert "is no sweep" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["max_latency_ms=fast", "min_quality=true", "max_latency_m=1"])
def test_limit_that_is_no_number_or_no_limit_is_refused(folder, word, capsys):
    assert report.main([str(folder), word]) == 2
    assert word.partition("=")[0] in capsys.readouterr().err
