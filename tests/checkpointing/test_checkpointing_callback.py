"""When checkpoints are written, which are kept, and what is refused."""

import errno
import functools
import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from kill_job import BATCH, SAMPLES, make_run

from lightning_opt.callbacks.non_finite import NonFiniteGuard
from lightning_opt.checkpointing import DurableCheckpointIO, SaveCheckpoints, find_checkpoint
from lightning_opt.checkpointing.callback import first_non_finite
from lightning_opt.errors import ConfigError, NonFiniteError, StorageError

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = SAMPLES // BATCH


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


class Scores(pl.Callback):
    """Logs given values as the validation metric, one an epoch."""

    def __init__(self, values):
        self.values = values

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.log("val/score", torch.tensor(self.values[trainer.current_epoch]))


def train(folder, values=(0.0,), callbacks=(), trainer=None, **options):
    saver = SaveCheckpoints(folder, **{"monitor": "val/score"} | options)
    run = make_run(
        folder, max_epochs=len(values), callbacks=[functools.partial(Scores, values), *callbacks], **trainer or {}
    )
    run.trainer.callbacks[-1] = saver
    run.trainer.fit(run.module, **run.data)
    return saver


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", [0.1, 0.5, 0.3], 1),
        ("min", [0.1, 0.5, 0.3], 0),
        ("max", [0.5, 0.5], 0),
        ("max", [NAN, 0.2, NAN], 1),
        ("max", [0.2, INF], 0),
        ("min", [0.2, -INF], 0),
    ],
)
def test_best_is_the_first_best_finite_value(tmp_path, mode, values, best):
    saver = train(tmp_path, values, mode=mode)
    assert saver.best_value == pytest.approx(values[best])
    assert saver.best_step == step_of(saver.best_path) == STEPS * (best + 1)
    assert saver.best_model_path == str(tmp_path / "best.ckpt")


class SettlesAfter(pl.Callback):
    """Stands for a callback that changes the model until a step."""

    def __init__(self, step):
        self.step, self.is_settled = step, False

    def on_train_batch_end(self, trainer, *_):
        self.is_settled = trainer.global_step >= self.step


@pytest.mark.parametrize(
    ("step", "best"),
    [(0, 0), (STEPS, 0), (STEPS + 1, 1), (2 * STEPS, 1), (2 * STEPS + 1, 3), (3 * STEPS + 1, 3), (4 * STEPS + 1, None)],
)
def test_a_model_that_is_still_being_changed_is_never_best(tmp_path, step, best):
    values = [0.9, 0.5, 0.1, 0.3]
    saver = train(tmp_path, values, callbacks=[functools.partial(SettlesAfter, step)])
    assert saver.best_value == (None if best is None else pytest.approx(values[best]))
    assert saver.best_step == (None if best is None else STEPS * (best + 1))


def test_nothing_is_best_if_nothing_is_finite(tmp_path):
    saver = train(tmp_path, [NAN, NAN])
    assert (saver.best_path, saver.best_value) == ("", None)
    assert step_of(saver.last_path) == 2 * STEPS


@pytest.mark.parametrize(
    ("keep", "names"), [(1, {"last"}), (2, {"last", "previous"}), (3, {"last", "previous", "previous-2"})]
)
def test_older_versions_are_kept(tmp_path, keep, names):
    train(tmp_path, [0.0] * 4, keep=keep, monitor=None)
    steps = {path.stem: step_of(path) for path in tmp_path.glob("*.ckpt")}
    expected = {"last": 4 * STEPS, "previous": 3 * STEPS, "previous-2": 2 * STEPS}
    assert steps == {name: expected[name] for name in names}
    (tmp_path / "last.ckpt").write_bytes(b"damaged")
    if keep > 1:
        assert find_checkpoint(tmp_path).name == "previous.ckpt"


def test_steps_and_epochs_at_which_it_saves(tmp_path):
    saved = []

    class Watched(DurableCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            saved.append((checkpoint["global_step"], Path(path).stem))
            super().save_checkpoint(checkpoint, path, storage_options)

    train(tmp_path, [0.0] * 4, every_n_steps=3, every_n_epochs=3, monitor=None, trainer={"plugins": [Watched()]})
    # 5 steps an epoch: each third step, the end of epoch 3, and the end of the fit
    assert saved == [(step, "last") for step in (3, 6, 9, 12, 15, 18, 20)]


def test_it_writes_durably_in_any_trainer(tmp_path):
    train(tmp_path)
    assert (tmp_path / "last.ckpt.json").exists()


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"monitor='val/acc' was not logged: choose one of .*val/score"):
        train(tmp_path, monitor="val/acc")


@pytest.mark.parametrize("bad", [{"keep": 0}, {"every_n_steps": 0}, {"every_n_epochs": -1}, {"mode": "maximum"}])
def test_bad_values_are_named(tmp_path, bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        SaveCheckpoints(tmp_path, **bad)


class HoldsAPath(pl.Callback):
    def state_dict(self):
        return {"folder": Path("x")}


def test_what_cannot_be_loaded_is_refused_before_the_first_step(tmp_path):
    steps = []

    class Counts(pl.Callback):
        def on_train_batch_start(self, *_):
            steps.append(1)

    with pytest.raises(ConfigError, match=r"callbacks\.HoldsAPath\.folder"):
        train(tmp_path, callbacks=[HoldsAPath, Counts])
    assert steps == []


def test_a_full_disk_is_found_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_opt.checkpointing.files.free_bytes", lambda _: 1000)
    with pytest.raises(StorageError, match=r"need about \d+ bytes, 1000 are free"):
        train(tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("keep", [2, 3])
def test_a_disk_that_fills_up_leaves_all_versions_as_they_were(tmp_path, monkeypatch, keep):
    class Fills(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                monkeypatch.setattr(os, "write", full)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"last\.ckpt.*No space left"):
        train(tmp_path, callbacks=[Fills], every_n_steps=1, keep=keep)
    monkeypatch.undo()
    kept = {"last.ckpt": 3, "previous.ckpt": 2, "previous-2.ckpt": 1}
    assert {path.name: step_of(path) for path in tmp_path.glob("*.ckpt")} == dict(list(kept.items())[:keep])
    assert find_checkpoint(tmp_path).name == "last.ckpt"
    assert not list(tmp_path.glob(".*"))


def test_leftovers_of_a_dead_process_are_swept_at_the_start(tmp_path):
    (tmp_path / ".last.ckpt.tmp.999999999.0a").write_bytes(b"x")
    train(tmp_path)
    assert not list(tmp_path.glob(".*"))


class Breaks(pl.Callback):
    """Makes a weight infinite after a step, as a much too large learning rate does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.net[4].bias[1] = INF


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 3: parameter net\.4\.bias is not finite"):
        train(tmp_path, [0.0, 0.1], callbacks=[functools.partial(Breaks, 3)], every_n_steps=1)
    assert step_of(find_checkpoint(tmp_path)) == 2


class Spoils(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            batch[0][0, 0] = NAN


@pytest.mark.parametrize("step", [3, STEPS - 1])
def test_nothing_is_saved_once_the_guard_has_tripped(tmp_path, step):
    with pytest.raises(NonFiniteError):
        train(tmp_path, [0.0, 0.1], callbacks=[NonFiniteGuard, functools.partial(Spoils, step)], every_n_steps=1)
    assert step_of(find_checkpoint(tmp_path)) == step
    assert not (tmp_path / "best.ckpt").exists()


def test_the_first_parameter_that_is_not_finite_is_named():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert first_non_finite(module) is None
    module[1].weight.data[0, 1] = NAN
    assert first_non_finite(module) == "1.weight"


def test_fast_dev_run_writes_nothing(tmp_path):
    train(tmp_path, trainer={"fast_dev_run": 2})
    assert not list(tmp_path.glob("*.ckpt"))


def test_ckpt_path_best_of_a_trainer_is_ours(tmp_path):
    run = make_run(tmp_path, max_epochs=1)
    run.trainer.fit(run.module, **run.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = run.trainer.validate(run.module, datamodule=run.data["datamodule"], ckpt_path="best", verbose=False)
    assert result["val/loss"] == pytest.approx(run.trainer.checkpoint_callback.best_value)
