"""The checker of resumes: what it calls a difference, and that it fails when there is one."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_opt.checkpointing import RngState, SaveCheckpoints
from lightning_opt.testing.resume import Fit, check_resume, compare_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
NAN = float("nan")


def differences(tmp_path, first, second, **options):
    torch.save(first, tmp_path / "a.ckpt")
    torch.save(second, tmp_path / "b.ckpt")
    return compare_checkpoints(tmp_path / "a.ckpt", tmp_path / "b.ckpt", **options)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (torch.tensor([1.0]), torch.tensor([1.0]), True),
        (torch.tensor([NAN]), torch.tensor([NAN]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor(1.0), torch.tensor([1.0]), False),
        (torch.tensor([True]), torch.tensor([False]), False),
        (NAN, NAN, True),
        (1, 1.0, False),
        (1, True, False),
        ([1, 2], [1, 2, 3], False),
        ([1, 2], (1, 2), True),
        (None, None, True),
    ],
)
def test_equal_is_bit_equal(tmp_path, first, second, equal):
    found = differences(tmp_path, {"a": {"b": [first]}}, {"a": {"b": [second]}})
    assert (found == []) is equal
    assert all(path.startswith("a.b[0]") for path in found)


def test_missing_values_are_named_and_some_may_be_ignored(tmp_path):
    assert differences(tmp_path, {"a": 1, "t": {"x": 1}}, {"b": 1, "t": {"x": 2}}) == [
        "a (only in one)",
        "b (only in one)",
        "t.x",
    ]
    assert differences(tmp_path, {"a": 1, "t": {"x": 1}}, {"a": 1, "t": {"x": 2}}, ignore=["t"]) == []


class Net(pl.LightningModule):
    def __init__(self, noise):
        super().__init__()
        self.net, self.noise = torch.nn.Linear(2, 1), noise

    def training_step(self, batch, batch_idx):
        return (self.net(batch) + self.noise * torch.rand(())).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_run(folder: Path, *, noise=1.0, rng=True) -> Fit:
    torch.manual_seed(0)
    callbacks = [*([RngState()] if rng else []), SaveCheckpoints(folder, every_n_steps=1)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    return Fit(trainer, Net(noise), {"train_dataloaders": DataLoader(torch.ones(3, 2), batch_size=1)})


def test_a_run_that_resumes_exactly_passes(tmp_path):
    check_resume(make_run, folder=tmp_path, stop_at_steps=[3])


def test_a_run_that_forgets_something_fails_by_name(tmp_path):
    with pytest.raises(AssertionError, match=r"stop after \[3\]: .*state_dict\.net\.(weight|bias)"):
        check_resume(lambda folder: make_run(folder, rng=False), folder=tmp_path, stop_at_steps=[3])


def test_a_stop_that_never_comes_fails(tmp_path):
    with pytest.raises(AssertionError, match="the run ended before step 60"):
        check_resume(make_run, folder=tmp_path, stop_at_steps=[60])
