"""Masks in a training: exact counts, zeros that stay, clean moments, and whatever the training does besides."""

import copy
import itertools
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from prune_job import STEPS, Mlp, Stranger, fit, make_run
from torch import nn

from lightning_opt.callbacks import Prune
from lightning_opt.pruning.allocation import GlobalAllocation, Uniform
from lightning_opt.pruning.criteria import Criterion, Random, Snip, Taylor, Wanda
from lightning_opt.pruning.patterns import NM, Block
from lightning_opt.pruning.regrow import RigL
from lightning_opt.pruning.schedules import Iterative, OneShot
from lightning_opt.pruning.solvers import SparseGPT

pytestmark = pytest.mark.filterwarnings("ignore")


def weights_of(net):
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}


class Watch(pl.Callback):
    """Looks at a network before each forward: zeros so far, and the step."""

    def __init__(self, into):
        self.into = into

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        zeros = {name: p.detach() == 0 for name, p in weights_of(pl_module.net).items()}
        self.into.append((trainer.global_step, zeros))


def train(tmp_path, *callbacks, **options):
    return fit(make_run(tmp_path, *callbacks, save=False, **options))


@pytest.mark.support(method="unstructured", strategy="one", feature="trains")
@pytest.mark.parametrize("allocation", [GlobalAllocation(), Uniform()])
def test_counts_follow_the_cubic_schedule_exactly(tmp_path, allocation):
    """Zhu and Gupta: s_f * (1 - (1 - t)^3), of all weights, at each update and between two."""
    seen = []
    prune = partial(Prune, allocation=allocation, start="3 steps", end="12 steps", every="3 steps", sparsity=0.8)
    run = train(tmp_path, prune, partial(Watch, seen))
    total = sum(p.numel() for p in weights_of(run.module.net).values())
    for step, zeros in seen:
        update = min(step // 3 * 3, 12)
        share = 0.8 * (1 - (1 - max(update - 3, 0) / 9) ** 3)
        found = sum(int(mask.sum()) for mask in zeros.values())
        assert abs(found - share * total) <= (1 if isinstance(allocation, GlobalAllocation) else 3), step
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert all(bool((after[name] | ~before[name]).all()) for name in before)  # what is out stays out


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_masked_weights_are_zero_in_every_forward(tmp_path, options):
    seen = []
    prune = partial(Prune, start="1 steps", end="6 steps", every="1 steps", sparsity=0.75)
    run = train(tmp_path, prune, partial(Watch, seen), **options)
    total = sum(p.numel() for p in weights_of(run.module.net).values())
    last = seen[-1][1]
    assert abs(sum(int(mask.sum()) for mask in last.values()) - 0.75 * total) <= 3
    settled = [zeros for step, zeros in seen if step >= 6]
    assert len(settled) > 2
    assert all(torch.equal(zeros[name], last[name]) for zeros in settled for name in last)


def test_moments_of_masked_weights_are_zero_when_they_are_masked(tmp_path):
    found = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 6:
                optimizer = trainer.optimizers[0]
                for weight in weights_of(pl_module.net).values():
                    state = optimizer.state[weight]
                    found.extend(state[key][weight == 0] for key in ("exp_avg", "exp_avg_sq"))
                    assert bool(state["exp_avg"][weight != 0].any())

    train(tmp_path, partial(Prune, start="3 steps", end="6 steps", every="3 steps"), Look)
    assert sum(moment.numel() for moment in found) > 300
    assert all(not bool(moment.any()) for moment in found)


class Gan(Stranger):
    """Two optimizers over two halves, one of which steps twice in a batch, as adversarial trainings do."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.dense_forwards = 0

    def configure_optimizers(self):
        first, second = list(self.net[0].parameters()), [*self.net[3].parameters(), *self.net[5].parameters()]
        return torch.optim.Adam(first, lr=0.02), torch.optim.SGD(second, lr=0.1, momentum=0.9)

    def training_step(self, batch, batch_idx):
        one, other = self.optimizers()
        for optimizer in (one, other, one):
            if self.trainer.global_step >= 30:
                self.dense_forwards += any(int((p == 0).sum()) < 0.4 * p.numel() for p in weights_of(self.net).values())
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


def test_several_optimizers_in_manual_optimization(tmp_path):
    """Each optimizer's step counts, and no forward within a batch sees a weight that came back."""
    prune = partial(Prune, allocation=Uniform(), sparsity=0.5, start="6 steps", end="30 steps", every="6 steps")
    run = train(tmp_path, prune, module=Gan)
    assert run.trainer.global_step == 3 * STEPS
    assert run.module.dense_forwards == 0
    assert all(int((p == 0).sum()) == p.numel() // 2 for p in weights_of(run.module.net).values())


@pytest.mark.parametrize("criterion", [Snip(), Taylor()])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_evidence_is_that_of_the_last_whole_batches(tmp_path, criterion, accumulate):
    """Scores that are computed here from the gradients of the observed steps give the same masks."""
    gradients = []

    class Collect(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step in (2, 3, 4):
                gradients.append({n: p.grad.clone() for n, p in weights_of(pl_module.net).items()})

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                self.zeros = {n: p == 0 for n, p in weights_of(pl_module.net).items()}

    class Before(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 5 and not hasattr(self, "weights"):
                self.weights = {n: p.detach().clone() for n, p in weights_of(pl_module.net).items()}

    collect, before = Collect(), Before()
    prune = partial(
        Prune,
        criterion=criterion,
        allocation=GlobalAllocation(),
        schedule=OneShot(),
        start="5 steps",
        end="5 steps",
        observe_steps=3,
        sparsity=0.6,
    )
    train(tmp_path, lambda: before, prune, lambda: collect, accumulate_grad_batches=accumulate, gradient_clip_val=1e-3)
    assert len(gradients) == 3
    power = 1 if isinstance(criterion, Snip) else 2
    scores = {
        n: (torch.stack([g[n].double() for g in gradients]).pow(power).mean(0) * w.double().pow(power)).abs()
        for n, w in before.weights.items()
    }
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.sort(descending=True).values[round(0.4 * flat.numel())]
    for name, score in scores.items():
        assert torch.equal(collect.zeros[name], score <= threshold)


def test_a_subclass_decides_how_sparse(tmp_path):
    class Half(Prune):
        def decide(self, step):
            return 0.5 if step >= 4 else 0.0

    run = train(tmp_path, partial(Half, allocation=Uniform(), sparsity=0.5, every="1 steps"))
    assert all(int((p == 0).sum()) == p.numel() // 4 for p in weights_of(run.module.net).values())


@pytest.mark.support(method="n_m", strategy="one", feature="trains")
def test_n_of_m_and_blocks(tmp_path):
    run = train(tmp_path, partial(Prune, NM(2, 4)))
    for weight in weights_of(run.module.net).values():
        assert bool(((weight.reshape(-1, 4) != 0).sum(1) == 2).all())
    run = train(tmp_path, partial(Prune, Block(1, 4), sparsity=0.5))
    blocks = torch.cat([(w.reshape(-1, 4) != 0).sum(1) for w in weights_of(run.module.net).values()])
    assert set(blocks.tolist()) == {0, 4}
    assert abs(int((blocks == 0).sum()) - len(blocks) / 2) <= 2


def test_lottery_tickets_return_to_their_early_values(tmp_path):
    values = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            values[trainer.global_step] = copy.deepcopy(pl_module.net.state_dict())
            states = trainer.optimizers[0].state
            values[trainer.global_step]["steps"] = len(states)

    schedule = Iterative(rounds=2, rewind_to=0.25)  # saved after step 3, of 12: back after steps 6 and 12
    train(tmp_path, partial(Prune, schedule=schedule, start="0 steps", end="12 steps", every="1 steps"), Look)
    for back in (6, 12):
        for name, early in values[3].items():
            if name != "steps":
                kept = values[back][name] != 0
                assert torch.equal(values[back][name][kept], early[kept]), name
        assert values[back]["steps"] == 0  # the optimizer has forgotten
        assert not torch.equal(values[back + 1]["0.weight"], values[back]["0.weight"])
    zeros = [sum(int((v == 0).sum()) for k, v in values[s].items() if "weight" in k) for s in (6, 12)]
    assert 0 < zeros[0] < zeros[1]


def test_rigl_exchanges_weights_and_keeps_their_number(tmp_path):
    """Evci et al., algorithm 1: what comes has the largest gradients of what is masked, what goes the least size."""
    before, after, gradients, sizes = {}, {}, {}, {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 3:
                gradients.update({n: p.grad.abs() for n, p in weights_of(pl_module.net).items()})

        def on_train_batch_end(self, trainer, pl_module, *_):
            masks = {name: mask.clone() for name, mask in trainer.callbacks[1]._run.masks.as_dict().items()}
            if trainer.global_step == 3:
                before.update(masks)
            if trainer.global_step == 4:
                after.update(masks)

    class Size(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                sizes.update({n: p.detach().abs().clone() for n, p in weights_of(pl_module.net).items()})

    prune = partial(
        Prune,
        criterion=Random(),
        schedule=OneShot(),
        regrow=RigL(),
        sparsity=0.5,
        start="0 steps",
        end="12 steps",
        every="4 steps",
        observe_steps=1,
    )
    train(tmp_path, Size, prune, Look)
    exchanged = 0
    for name, old in before.items():
        came, went, stayed = after[name] & ~old, old & ~after[name], old & after[name]
        assert came.sum() == went.sum()
        if not came.any():  # what went in a small layer was the best to come back
            continue
        exchanged += 1
        assert gradients[name][came].min() >= gradients[name][~old & ~after[name]].max()
        # what stayed is larger than what went, but for what went and came back at once
        larger = stayed & (sizes[name] > sizes[name][went].max())
        assert larger.sum() + int(0.3 / 2 * (1 + 0.5) * int(old.sum())) >= stayed.sum()
    assert exchanged > 0


class Change(pl.Callback):
    """Measures how much the first layer's answer to a batch moves at step 8."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 8:
            self.layer, self.x = copy.deepcopy(pl_module.net[0]), batch[0]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            self.size = float((pl_module.net[0](self.x) - self.layer(self.x)).norm())


def test_a_solver_prunes_at_its_moment_and_changes_the_answers_less(tmp_path):
    """SparseGPT corrects what stays: better than zeroing the same number of weights."""
    sizes = []
    for solver in (SparseGPT(), None):
        change = Change()
        options = {"schedule": OneShot(), "start": "8 steps", "end": "8 steps", "sparsity": 0.5, "observe_steps": 8}
        prune = partial(Prune, solver=solver, allocation=None if solver else Uniform(), **options)
        run = train(tmp_path, lambda change=change: change, prune)
        assert int((run.module.net[0].weight == 0).sum()) == 64
        sizes.append(change.size)
    assert 0 < sizes[0] < sizes[1]


def test_a_network_is_found_or_named(tmp_path):
    class Two(Stranger):
        def __init__(self):
            super().__init__()
            self.other = Mlp()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]) + self.other(batch[0]), batch[1])

    run = train(tmp_path, partial(Prune, module="other"), module=Two)
    assert not any(bool((p == 0).any()) for p in weights_of(run.module.net).values())
    assert any(bool((p == 0).any()) for p in weights_of(run.module.other).values())
    run = train(tmp_path, Prune, module=Two)  # nothing says which: both
    assert all(bool((p == 0).any()) for p in (run.module.net[0].weight, run.module.other[0].weight))


def test_it_is_logged_when_it_changes_and_told_as_a_stage(tmp_path):
    rows = []

    class Log(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            rows.append((step, metrics["student/sparsity"])) if "student/sparsity" in metrics else None

    run = make_run(tmp_path, partial(Prune, start="3 steps", end="9 steps", every="3 steps"), save=False, logger=Log())
    fit(run)
    assert [step for step, _ in rows] == [0, 5, 8]
    assert rows[-1][1] == pytest.approx(0.9, abs=0.01)
    assert float(run.trainer.callback_metrics["student/sparsity"]) == pytest.approx(rows[-1][1])
    (stage,) = run.trainer.callbacks[0].stages()
    assert (stage["method"], stage["from_step"], stage["to_step"]) == ("prune", 3, 9)
    assert "90.0% of 448 weights" in stage["what"]


class Broken(Criterion):
    def score(self, weight, evidence):
        return weight * float("nan")


def test_scores_that_are_no_numbers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"0\.weight"):
        train(tmp_path, partial(Prune, criterion=Broken()))


def test_a_compiled_network_is_pruned_alike(tmp_path):
    """Hooks come and go, which compiled code does not notice by itself."""

    def module():
        made = Stranger()
        made.net.compile(backend="eager")
        return made

    prune = partial(Prune, criterion=Wanda(), start="2 steps", end="8 steps", every="3 steps", observe_steps=1)
    plain = train(tmp_path, prune).module.net.state_dict()
    compiled = train(tmp_path, prune, module=module).module.net.state_dict()
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(value, compiled[name])
