"""Figures: the right points and numbers are in them, whatever the number of series and the names."""

import copy

import matplotlib
import numpy as np
import pytest
from fake_run import HOSTILE, full_record, write_metrics
from matplotlib.image import imread

from lightning_opt.reporting import run_metrics, style
from lightning_opt.reporting.curves import draw_losses, draw_quality, loss_terms
from lightning_opt.reporting.figures import draw_all, draw_plane, points_of
from lightning_opt.reporting.gain_figures import draw_gains, gains_of
from lightning_opt.reporting.labels import spread


def texts(figure):
    return [found.get_text() for found in figure.findobj(matplotlib.text.Text) if found.get_text()]


def test_every_point_is_named_and_where_it_was_measured(record):
    points = {point.label: point for point in points_of(record)}
    assert set(points) == {"teacher", "student alone", "distilled student", "onnx"}
    assert points["teacher"].latency_ms == 4.21
    assert points["onnx"].size_bytes == 290_110
    with style.look():
        figure = draw_plane(list(points.values()), "acc")
    assert set(points) <= set(texts(figure))
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    drawn = {tuple(np.round(pair, 6)) for found in figure.axes[0].collections for pair in found.get_offsets()}
    assert {(4.21, 0.976), (0.82, 0.945), (0.81, 0.968), (0.33, 0.968)} <= drawn


def test_gains_are_teacher_over_student(record):
    gains = dict(gains_of(record))
    assert gains["parameters"] == pytest.approx(1_212_042 / 71_402)
    assert gains["latency, batch 32"] == pytest.approx(61.0 / 8.4)
    assert "non-zero parameters" not in gains  # the same as all parameters
    with style.look():
        assert {"17×", "7.3×"} <= set(texts(draw_gains(record)))


@pytest.mark.parametrize("count", [2, 12])
def test_every_loss_term_has_a_panel(tmp_path, record, count):
    terms = [f"loss_{place}" for place in range(count)]
    write_metrics(tmp_path / "metrics.csv", best=0.9, terms=terms)
    tables = run_metrics(tmp_path)
    assert loss_terms(tables)[0] == "train/loss"
    with style.look():
        figure = draw_losses(record, tables)
    assert {"loss", *terms} <= {axes.get_title(loc="left") for axes in figure.axes}


def test_quality_shows_the_student_the_student_alone_and_the_teacher_as_a_level(run_dir, record):
    tables = run_metrics(run_dir)
    with style.look():
        figure = draw_quality(record, tables)
    names = " ".join(texts(figure))
    for name, model in (("distilled student", "student"), ("student alone", "baseline"), ("teacher", "teacher")):
        assert f"{name} {tables[model]['val/acc'].value[-1]:.3f}" in names


def test_a_run_with_hostile_names_gives_all_figures(tmp_path):
    record = full_record()
    for name in HOSTILE[-3:]:
        record["models"][name] = copy.deepcopy(record["models"]["student"])
    write_metrics(
        tmp_path / "metrics.csv", best=0.9, terms=[f"loss_{name}" for name in HOSTILE[:4]], steps=60, epochs=2
    )
    drawn = draw_all(tmp_path, record, run_metrics(tmp_path))
    assert len(drawn) == 5
    for each in drawn:
        pixels = imread(each.path)
        assert pixels.shape[1] == 1440
        assert pixels.std() > 0.02  # not blank


def test_metrics_that_are_not_finite_do_not_stop_the_figures(tmp_path, record):
    rows = ["epoch,step,train/loss,val/acc", "0,1,nan,0.1", "0,2,inf,nan", "0,3,-inf,0.2"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    names = {each.path.stem for each in draw_all(tmp_path, record, run_metrics(tmp_path))}
    assert {"losses", "quality"} <= names


def test_drawing_leaves_matplotlib_as_it_was(tmp_path, record):
    matplotlib.rcParams["lines.linewidth"] = 7.25
    try:
        draw_all(tmp_path, record, {})
        assert matplotlib.rcParams["lines.linewidth"] == 7.25
    finally:
        matplotlib.rcdefaults()


def test_labels_are_pushed_apart_with_least_movement():
    places = spread([5.0, 5.0, 5.0, 20.0], gap=2.0, low=0.0, high=30.0)
    assert places == pytest.approx([3.0, 5.0, 7.0, 20.0])
    assert min(np.diff(sorted(spread([9.9, 9.8, 9.7], gap=1.0, low=0.0, high=10.0)))) >= 1.0 - 1e-9
    assert max(spread([9.9, 9.8, 9.7], gap=1.0, low=0.0, high=10.0)) <= 10.0
