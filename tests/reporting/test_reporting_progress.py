"""How far an unfinished run came: from what its folder holds, whatever state that is in."""

import numpy as np
import pytest

from lightning_opt.reporting.metrics import Series
from lightning_opt.reporting.progress import how_far

STOPPED = {"status": "failed"}


def series(steps, values, epochs=None):
    count = len(steps)
    return Series(
        step=np.array(steps),
        epoch=np.array(epochs or [np.nan] * count, dtype=float),
        value=np.array(values, dtype=float),
    )


def test_the_last_step_epoch_and_validation_value(tmp_path):
    tables = {"student": {"train/loss": series([5, 25], [1, 0.5], [0, 2]), "val/acc": series([20], [0.75], [1])}}
    said = how_far(tmp_path, STOPPED, tables)
    assert said == ["The model came as far as step 25 (epoch 2), where val/acc was last 0.750; it left no checkpoint."]


def test_nothing_began(tmp_path):
    assert how_far(tmp_path, STOPPED, {}) == ["No training step was logged."]


def test_a_finished_run_needs_no_such_words(tmp_path):
    assert how_far(tmp_path, {"status": "finished"}, {"student": {"train/loss": series([5], [1])}}) == []


@pytest.mark.parametrize("content", ["", "[]", '{"quality": {}}', '{"quality": {"acc": "x"}, "steps": 3}', "null"])
def test_a_fit_file_that_is_damaged_counts_as_none(tmp_path, content):
    (tmp_path / "fit.json").write_text(content, encoding="utf-8")
    (said,) = how_far(tmp_path, STOPPED, {"student": {"train/loss": series([7], [np.nan])}})
    assert said.startswith("The model came as far as step 7")
