"""A NaN or an infinity stops the run, or leaves no trace of its batch."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_opt.callbacks.non_finite import NonFiniteGuard, is_bad
from lightning_opt.checkpointing import MetricState, RngState, SaveCheckpoints
from lightning_opt.errors import NonFiniteError
from lightning_opt.testing.resume import Fit, check_resume

pytestmark = pytest.mark.filterwarnings("ignore")
NAN, INF = float("nan"), float("inf")


class Net(pl.LightningModule):
    """Batch norm and AdamW; `spoil` says at which batch what goes wrong."""

    def __init__(self, spoil=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.spoil = spoil or {}
        self.hook = None

    def training_step(self, batch, batch_idx):
        x = batch
        kind = self.spoil.get(self.trainer.fit_loop.total_batch_idx)
        if kind == "input":
            x = x + torch.tensor([NAN, 0.0, 0.0])
        loss = self.net(x).square().mean()
        if kind == "loss":
            loss = loss + INF * (loss.detach() + 1)
        if kind == "gradient":
            self.hook = self.net[2].weight.register_hook(lambda grad: grad * INF)
        return loss

    def on_after_backward(self):
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def batches(skip=()):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 5, 3, generator=generator)
    return DataLoader([row for number, row in enumerate(rows) if number not in skip], batch_size=None)


def run(net, *, guard=None, data=None, folder=None, state=None, **options):
    if state is not None:
        net.load_state_dict(state)
    callbacks = [*([guard] if guard else []), *([SaveCheckpoints(folder, every_n_steps=1)] if folder else [])]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=bool(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(net, data or batches())
    return net, trainer


@pytest.mark.parametrize(
    ("kind", "named"), [("input", "the loss"), ("loss", "the loss"), ("gradient", r"the gradient of net\.2\.weight")]
)
def test_stop_names_the_step_and_what(kind, named):
    guard = NonFiniteGuard()
    net = Net({2: kind})
    with pytest.raises(NonFiniteError, match=f"step 2: {named}.* is not finite") as caught:
        run(net, guard=guard)
    assert caught.value.exit_code == 5
    assert guard.tripped
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_without_the_guard_the_weights_are_lost():
    net, _ = run(Net({2: "input"}))
    assert any(torch.isnan(p).any() for p in net.parameters())


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
def test_a_skipped_step_leaves_no_trace(kind):
    net = Net({2: kind})
    start = copy.deepcopy(net.state_dict())
    guard = NonFiniteGuard("skip")
    spoilt, trainer = run(net, guard=guard)
    # the reference never saw that batch; the schedule goes by steps, so it makes one step more there
    reference = Net()
    reference.load_state_dict(start)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0.1)
    for number, x in enumerate(batches()):
        if number != 2:
            optimizer.zero_grad()
            reference.net(x).square().mean().backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    for (name, one), other in zip(spoilt.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(trainer.optimizers[0].state.values(), optimizer.state.values(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(one[key], other[key]), key
    assert (guard.skipped_steps, guard.tripped) == (1, False)


def test_with_accumulation_the_whole_step_is_left_out():
    net = Net({3: "input"})
    start = copy.deepcopy(net.state_dict())
    spoilt, _ = run(net, guard=NonFiniteGuard("skip"), accumulate_grad_batches=2)
    reference, _ = run(Net(), state=start, data=batches(skip=(2, 3)), accumulate_grad_batches=2)
    assert torch.equal(spoilt.net[1].running_mean, reference.net[1].running_mean)
    assert spoilt.net[1].num_batches_tracked == 4


def test_rollback_returns_to_the_last_checkpoint(tmp_path):
    class Remembers(pl.Callback):
        def __init__(self):
            self.before, self.after, self.rates = None, None, []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            if batch_idx == 2:
                self.before = copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict()["state"]))
                with torch.no_grad():
                    pl_module.net[0].weight.add_(1.0)  # the damage that came before the bad step
            if batch_idx == 3:
                self.after = copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict()["state"]))

    remembers, guard = Remembers(), NonFiniteGuard("rollback", limit=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[remembers, guard, SaveCheckpoints(tmp_path, every_n_steps=1)],
    )
    trainer.fit(Net({2: "loss"}), batches())
    for one, other in zip(remembers.before, remembers.after, strict=True):
        assert str(one) == str(other)
    assert remembers.rates == pytest.approx([0.1 * 0.9**step for step in range(6)])
    assert guard.rollbacks == 1


def test_rollback_needs_a_checkpoint():
    with pytest.raises(NonFiniteError, match="no checkpoint yet"):
        run(Net({2: "loss"}), guard=NonFiniteGuard("rollback"))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_the_limit_stops_it(tmp_path, policy):
    guard = NonFiniteGuard(policy, limit=2)
    with pytest.raises(NonFiniteError, match=f"step 3: .* after 2 times {policy}"):
        run(Net(dict.fromkeys(range(1, 6), "loss")), guard=guard, folder=tmp_path)
    assert guard.tripped


def test_skips_that_are_not_in_a_row_do_not_add_up():
    guard = NonFiniteGuard("skip", limit=1)
    run(Net({1: "loss", 3: "loss", 5: "loss"}), guard=guard)
    assert guard.skipped_steps == 3


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_resume_over_a_bad_step_is_exact(tmp_path, policy):
    def make(folder):
        pl.seed_everything(1, verbose=False)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[NonFiniteGuard(policy), RngState(), MetricState(), SaveCheckpoints(folder, every_n_steps=2)],
            use_distributed_sampler=False,
        )
        return Fit(trainer, Net({9: "loss"}), {"train_dataloaders": batches()})

    check_resume(make, folder=tmp_path, stop_at_steps=[6, (6, 6)])


def test_one_reduction_finds_it_anywhere():
    gradients = [torch.full((3,), 3e38), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(0)]
    assert not is_bad(gradients[:2])  # large is not infinite
    assert not is_bad([])
    assert is_bad([], torch.tensor(NAN))
    for value in (NAN, INF, -INF):
        assert is_bad([*gradients[:2], torch.tensor([0.0, value])])


@pytest.mark.parametrize("bad", [{"policy": "ignore"}, {"limit": 0}])
def test_bad_values_are_named(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        NonFiniteGuard(**bad)
