"""The promise: stopped anywhere and resumed, a run ends bit-equal to the one that was not stopped."""

import contextlib
import functools
import os
import random
import signal
import time

import lightning.pytorch as pl
import pytest
import torch
from kill_job import BATCH, EPOCHS, SAMPLES, Data, Net, NoisyData, make_run, noisy_collate
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from lightning_opt.checkpointing import RngState, SaveCheckpoints, find_checkpoint, make_resumable
from lightning_opt.testing.resume import KillAfter, Killed, check_resume, compare_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = SAMPLES // BATCH  # in an epoch


def fit(run, folder=None):
    run.trainer.fit(run.module, ckpt_path=find_checkpoint(folder) if folder else None, **run.data)
    return run


def fit_until(run, step, folder):
    run.trainer.callbacks.insert(0, KillAfter(step))
    with pytest.raises(Killed):
        fit(run, folder)
    return run


# first, middle and last batch of an epoch, and several stops of one run
EVERYWHERE = [1, 3, STEPS, STEPS + 1, (3, 3 + STEPS), (STEPS, 2 * STEPS, 2 * STEPS + 2)]


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, EVERYWHERE),
        ({"workers": 2}, [3, (STEPS, STEPS + 4)]),
        ({"every_n_steps": 2}, [3, STEPS, (6, 11)]),
        ({"every_n_steps": None}, [3, STEPS, (6, 11)]),
        ({"scheduler": "plateau"}, [2, STEPS, (STEPS + 1, 2 * STEPS)]),
        ({"scheduler": "one_cycle"}, [3, (STEPS, STEPS + 2)]),
        ({"scheduler": "one_cycle", "workers": 2}, [3, STEPS]),
        ({"max_steps": 13}, [1, STEPS, (STEPS - 1, STEPS + 1, 12)]),
        ({"max_steps": 2 * STEPS, "limit_val_batches": 0}, [2, STEPS]),
        ({"val_check_interval": 2, "scheduler": "plateau"}, [2, 3, (4, STEPS, STEPS + 2)]),
        ({"check_val_every_n_epoch": 2}, [STEPS, (3, 2 * STEPS)]),
        ({"accumulate_grad_batches": 2}, [1, (2, 4), 3]),
        ({"limit_train_batches": 3}, [1, 3, (2, 4)]),
        ({"max_steps": 13, "val_check_interval": 3, "check_val_every_n_epoch": None}, [(2, 6), STEPS]),
        ({"reload_dataloaders_every_n_epochs": 1, "workers": 2}, [(3, STEPS)]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options, stops):
    check_resume(lambda folder: make_run(folder, **options), folder=tmp_path, stop_at_steps=stops)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        self.lr_schedulers().step()


def test_manual_optimization(tmp_path):
    def make(folder):
        run = make_run(folder)
        run.module = Manual()
        return run

    check_resume(make, folder=tmp_path, stop_at_steps=[(3, STEPS)])


def test_early_stopping_ends_at_the_same_epoch(tmp_path):
    def make(folder):
        stopper = functools.partial(EarlyStopping, "val/loss", patience=1, min_delta=10.0)
        return make_run(folder, callbacks=[stopper], max_epochs=9)

    check_resume(make, folder=tmp_path, stop_at_steps=[1, STEPS, (3, STEPS + 3)])
    # killed after the fit (testing, say) and started again: nothing more is trained
    run = fit(make(tmp_path / "whole"), tmp_path / "whole")
    assert run.trainer.current_epoch == 2
    assert run.trainer.global_step == 2 * STEPS


def test_saving_does_not_change_the_run(tmp_path):
    plain = make_run(tmp_path / "plain", rng=False, metrics=False)
    plain.trainer.callbacks[:] = [c for c in plain.trainer.callbacks if not isinstance(c, SaveCheckpoints)]
    fit(plain)
    saved = fit(make_run(tmp_path / "saved"))
    for one, other in zip(plain.module.state_dict().values(), saved.module.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for name, value in plain.trainer.callback_metrics.items():
        assert value == saved.trainer.callback_metrics[name]


def test_without_the_generators_it_is_another_run(tmp_path):
    with pytest.raises(AssertionError, match="values differ"):
        check_resume(lambda folder: make_run(folder, rng=False), folder=tmp_path, stop_at_steps=[3])


@pytest.mark.parametrize("with_state", [True, False])
def test_metrics_of_a_resumed_epoch_cover_all_of_it(tmp_path, with_state):
    expected = fit(make_run(tmp_path / "whole")).trainer.callback_metrics
    stop = STEPS * EPOCHS - 2
    fit_until(make_run(tmp_path / "cut", metrics=with_state), stop, None)
    found = fit(make_run(tmp_path / "cut", metrics=with_state), tmp_path / "cut").trainer.callback_metrics
    equal = {name for name in expected if torch.equal(expected[name], found.get(name, torch.tensor(-1.0)))}
    epoch_long = {"train/acc", "train/f1", "train/loss_epoch", "train/late", "train/dice"}
    assert epoch_long < set(expected)
    assert equal == (set(expected) if with_state else set(expected) - epoch_long - {"train/loss"})


def test_a_finished_run_is_not_run_again_and_knows_its_metrics(tmp_path):
    expected = fit(make_run(tmp_path)).trainer.callback_metrics
    before = (tmp_path / "last.ckpt").read_bytes()
    run = fit(make_run(tmp_path), tmp_path)
    assert run.trainer.global_step == STEPS * EPOCHS
    assert {k: float(v) for k, v in run.trainer.callback_metrics.items()} == {k: float(v) for k, v in expected.items()}
    assert (tmp_path / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("steps", [STEPS - 2, STEPS, STEPS + 2])
def test_a_run_that_is_given_more_steps_goes_on_exactly(tmp_path, steps):
    fit(make_run(tmp_path / "whole", max_steps=STEPS * 2 + 1))
    fit(make_run(tmp_path / "longer", max_steps=steps))
    fit(make_run(tmp_path / "longer", max_steps=STEPS * 2 + 1), tmp_path / "longer")
    assert compare_checkpoints(tmp_path / "whole" / "last.ckpt", tmp_path / "longer" / "last.ckpt") == []


class CountsEnds(pl.Callback):
    """Changes the model at the end of the fit, as a pruner that removes channels does."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.net[0].weight.mul_(2)


def test_what_happens_at_the_end_of_the_fit_is_not_lost_with_a_killed_process(tmp_path):
    make = functools.partial(make_run, callbacks=[CountsEnds])
    fit(make(tmp_path / "whole"))
    run = make(tmp_path / "cut")
    run.trainer.callbacks.insert(0, DiesAtTheEnd())
    with pytest.raises(Killed):
        fit(run)
    fit(make(tmp_path / "cut"), tmp_path / "cut")
    assert compare_checkpoints(tmp_path / "whole" / "last.ckpt", tmp_path / "cut" / "last.ckpt") == []
    # the last resort holds the end of the last epoch: nothing is left to train, but the end of the fit is
    best = tmp_path / "best" / "best.ckpt"
    fit(make(tmp_path / "best", max_epochs=1))
    for path in (tmp_path / "best").glob("*.ckpt"):
        if path != best:
            path.write_bytes(b"damaged")
    trained = make(tmp_path / "best", max_epochs=1)
    fit(trained, tmp_path / "best")
    again = make(tmp_path / "again", max_epochs=1)
    fit(again)
    assert torch.equal(trained.module.net[0].weight, again.module.net[0].weight)


class DiesAtTheEnd(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        raise Killed


def test_a_damaged_last_is_replaced_from_the_one_before(tmp_path):
    fit(make_run(tmp_path / "whole"))
    fit_until(make_run(tmp_path / "cut"), 7, None)
    last = tmp_path / "cut" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    run = make_run(tmp_path / "cut")
    fit_until(run, 7, tmp_path / "cut")  # from step 6: the damaged file must not have pushed out the good one
    assert find_checkpoint(tmp_path / "cut") == last
    assert torch.load(tmp_path / "cut" / "previous.ckpt", weights_only=True)["global_step"] == 6
    fit(make_run(tmp_path / "cut"), tmp_path / "cut")
    assert compare_checkpoints(tmp_path / "whole" / "last.ckpt", last) == []


class ForeignData(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(NoisyData(), batch_size=BATCH, shuffle=True, drop_last=True, collate_fn=noisy_collate)

    def val_dataloader(self):
        return Data().val_dataloader()


def test_a_foreign_data_module_is_made_resumable(tmp_path):
    def make(folder):
        return make_run(folder, data=make_resumable(ForeignData(), seed=5))

    check_resume(make, folder=tmp_path, stop_at_steps=[3, STEPS])


def test_a_foreign_loader_as_it_is_resumes_exactly_between_epochs(tmp_path):
    def make(folder):
        return make_run(folder, data=ForeignData(), every_n_steps=None)

    check_resume(make, folder=tmp_path, stop_at_steps=[STEPS, (STEPS + 2, 2 * STEPS)])


def test_a_loader_that_is_given_to_fit_is_bound_to_its_trainer(tmp_path):
    def make(folder):
        run = make_run(folder)
        loader = make_resumable(ForeignData().train_dataloader(), seed=5)
        run.data = {"train_dataloaders": loader, "val_dataloaders": Data().val_dataloader()}
        return run

    check_resume(make, folder=tmp_path, stop_at_steps=[3, STEPS, (2, STEPS + 2)])


def test_every_sample_is_seen_once_an_epoch_over_a_resume(tmp_path):
    seen = []

    class Watched(NoisyData):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    def make():
        data = Data()
        data.train_dataloader = lambda: make_resumable(
            DataLoader(Watched(), batch_size=BATCH, shuffle=True), seed=5, trainer=data.trainer
        )
        return make_run(tmp_path, data=data)

    for stop in (3, STEPS, STEPS + 4):
        fit_until(make(), stop, tmp_path)
        seen = seen[: stop * BATCH]  # the batch that was fetched and not trained on
    fit(make(), tmp_path)
    epochs = [seen[i : i + SAMPLES] for i in range(0, len(seen), SAMPLES)]
    assert len(epochs) == EPOCHS
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)


def test_another_number_of_ranks_is_warned_of(tmp_path):
    state = RngState()
    state.load_state_dict({"ranks": [{}, {}]})
    run = make_run(tmp_path, rng=False, callbacks=[lambda: state], max_steps=1)
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        fit(run)


def start_child(job):
    """Fork (importing everything again would take most of the test's time) and return the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                job()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            os._exit(code)
    return pid


def wait(pid, seconds=60.0, *, then=lambda: True):
    """Return the exit code, or None if it runs longer and until `then` is true (the process is killed -9)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or not then():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def test_kill_9_at_random_moments(tmp_path):
    # a large unused parameter makes saving take a good share of the time
    make = functools.partial(make_run, padding=2**19)
    fit(make(tmp_path / "whole"))
    folder, draw = tmp_path / "killed", random.Random(7)

    def saving():
        return any(folder.glob(".*.tmp.*"))

    kills = 0
    while kills < 8:
        pid = start_child(lambda: fit(make(folder), folder))
        # every other one in the middle of a save
        if wait(pid, draw.uniform(0.01, 0.3), then=saving if kills % 2 else lambda: True) is not None:
            break
        kills += 1
    assert kills >= 3
    assert wait(start_child(lambda: fit(make(folder), folder))) == 0
    assert compare_checkpoints(tmp_path / "whole" / "last.ckpt", folder / "last.ckpt") == []
    assert not list(folder.glob(".*"))


def test_sigterm_saves_at_the_end_of_the_step_and_stops(tmp_path):
    fit(make_run(tmp_path / "whole"))
    folder = tmp_path / "stopped"
    run = make_run(folder, callbacks=[functools.partial(SignalsItself, 7)], every_n_steps=None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        fit(run)
    assert caught.value.code == 143
    assert run.trainer.checkpoint_callback.stopped_by_signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 8
    resumed = fit(make_run(folder), folder)
    assert resumed.trainer.checkpoint_callback.stopped_by_signal is None
    assert compare_checkpoints(tmp_path / "whole" / "last.ckpt", folder / "last.ckpt") == []


class SignalsItself(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_in_the_last_batch_of_an_epoch_waits_for_its_validation(tmp_path):
    run = make_run(tmp_path, callbacks=[functools.partial(SignalsItself, STEPS - 1)], every_n_steps=None)
    with pytest.raises(SystemExit):
        fit(run)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (state["global_step"], state["epoch"]) == (STEPS, 1)


def test_sigterm_in_the_last_step_is_not_forgotten(tmp_path):
    run = fit(make_run(tmp_path, callbacks=[functools.partial(SignalsItself, STEPS - 1)], max_epochs=1))
    assert run.trainer.checkpoint_callback.stopped_by_signal == signal.SIGTERM
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_opt"]["finished"]


class SeedsByRank(pl.Callback):
    """Lets the ranks draw different numbers, as they should."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step == 0:
            torch.manual_seed(trainer.global_rank)


def two_ranks(folder, stop=()):
    callbacks = [SeedsByRank, *(functools.partial(KillAfter, step) for step in stop)]
    fit(make_run(folder, devices=2, strategy="ddp_fork", max_epochs=2, callbacks=callbacks), folder)


def test_two_processes_resume_bit_equal(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert wait(start_child(lambda: two_ranks(whole))) == 0
    assert wait(start_child(lambda: two_ranks(cut, stop=[1]))) not in (0, None)
    assert torch.load(find_checkpoint(cut), weights_only=True)["global_step"] == 1
    assert wait(start_child(lambda: two_ranks(cut))) == 0
    first, second = torch.load(whole / "last.ckpt", weights_only=True)["callbacks"]["RngState"]["ranks"]
    assert not torch.equal(first["torch"], second["torch"])
    assert compare_checkpoints(whole / "last.ckpt", cut / "last.ckpt") == []
