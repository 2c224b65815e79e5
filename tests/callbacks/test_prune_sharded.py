"""Pruning where no process has all weights: the masks, losses and resumed runs of one process."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from prune_job import Conv, Mlp, Stranger, fit, make_run
from torch.distributed.fsdp import fully_shard

from lightning_opt.callbacks import Prune, PruneDepth
from lightning_opt.callbacks.support import check_pair
from lightning_opt.checkpointing import find_checkpoint
from lightning_opt.checkpointing.sharded import load_whole
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.allocation import ERK, GlobalAllocation
from lightning_opt.pruning.criteria import Snip, Wanda
from lightning_opt.pruning.patterns import NM, Block
from lightning_opt.pruning.regrow import RigL
from lightning_opt.pruning.schedules import Iterative
from lightning_opt.pruning.solvers import SparseGPT
from lightning_opt.pruning.structured import Structures
from lightning_opt.strategies.sharded_presets import fsdp2
from lightning_opt.testing.ranks import on_ranks
from lightning_opt.testing.resume import KillAfter, Killed, _compare

pytestmark = pytest.mark.filterwarnings("ignore")

OFTEN = {"start": "2 steps", "end": "8 steps", "every": "2 steps", "sparsity": 0.7}
SNIP = partial(Prune, criterion=Snip(), allocation=ERK(), observe_steps=2, **OFTEN)
RIGL = partial(Prune, regrow=RigL(), start="2 steps", end="12 steps", every="2 steps", observe_steps=1, include=["3"])
WANDA = partial(Prune, criterion=Wanda(), observe_steps=2, include=["5"], **OFTEN)
# the layers of one network have pruners of their own, so that one training tells of several
RUNS = {
    "lamp": (partial(Prune, **OFTEN),),
    "fine": (partial(SNIP, include=["0"]), RIGL, WANDA),
    "coarse": (
        partial(Prune, Block(4, 1), allocation=GlobalAllocation(), include=["0"], **OFTEN),  # 20 rows: 10 and 10
        partial(Prune, NM(2, 4), include=["3"], **OFTEN),
        partial(Prune, allocation=GlobalAllocation(), include=["5"], **OFTEN),
    ),
}


class Doubled(Stranger):
    """Rounding is not what is compared; Lightning's precision for it does not go with sharded strategies."""

    def __init__(self, net):
        super().__init__(net.double())

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0].double(), batch[1]]


class Keep(pl.Callback):
    """Asks, at the end, what a checkpoint would hold of each pruner."""

    def __init__(self, states):
        self.states = states

    def on_train_end(self, trainer, pl_module):
        self.states += [one.state_dict() for one in trainer.callbacks if hasattr(one, "stages")]


def module():
    net = Mlp(width=20)
    net[2].p = 0.0  # each process would drop its own
    return Doubled(net)


def job(folder, *callbacks, ranks=2, stop=None, strategy=fsdp2, make=module, features=8, **options):
    """Train; return losses, what the pruners would save, and the weights."""
    if ranks > 1:
        options |= {"devices": ranks, "strategy": strategy()}
    callbacks = [*callbacks, *([partial(KillAfter, stop)] if stop else [])]
    save = options.pop("save", False)
    run = make_run(folder, *callbacks, module=make, features=features, save=save, **options)
    states = []
    run.trainer.callbacks.append(Keep(states))
    try:
        fit(run, resume=find_checkpoint(folder) if save else None)
    except Killed:
        return None
    return {"losses": torch.stack(run.module.seen), "states": states, "weights": dict(run.module.state_dict())}


def close(one, ranks, **tolerance):
    for rank in ranks:
        same_masks(one, rank)
        assert all(torch.equal(rank["weights"][name] == 0, value == 0) for name, value in one["weights"].items())
    close_values(one, ranks, **tolerance)


def close_values(one, ranks, *, rtol=1e-5, atol=1e-7):
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, one["losses"], rtol=rtol, atol=atol)
    for rank in ranks:
        assert rank["weights"].keys() == one["weights"].keys()
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=rtol, atol=atol)


def same_masks(one, other):
    for first, second in zip(one["states"], other["states"], strict=True):
        assert first["updates"] == second["updates"] >= 1
        assert first["is_shrunk"] or any(mask["bits"] is not None for mask in first["masks"]["masks"].values())
        for name, mask in first["masks"]["masks"].items():
            same_bits(mask["bits"], second["masks"]["masks"][name]["bits"], name)


def same_bits(one, other, name):
    assert (one is None) == (other is None), name
    assert one is None or torch.equal(one, other), name


@pytest.mark.support(method=["unstructured", "n_m"], strategy="fsdp2", feature=["masks", "loss"])
def test_two_processes_prune_what_one_does(tmp_path):
    ranks = on_ranks(
        lambda: {name: job(tmp_path, *run, gradient_clip_val=0.5) for name, run in RUNS.items()}, timeout_s=120
    )
    for name, run in RUNS.items():
        close(job(tmp_path, *run, ranks=1, gradient_clip_val=0.5), [rank[name] for rank in ranks])


SHRINK = partial(Prune, Structures(round_to=1), sparsity=0.5, start="2 steps", end="8 steps", every="3 steps")


def convolutions():
    return Doubled(Conv(norm=torch.nn.Identity))


def resumed(folder, *callbacks, stops, **options):
    """Run once without a stop and once with stops, in two processes; return what differs, and what each gave."""

    def both():
        whole = job(folder / "whole", *callbacks, save=True, **options)
        for stop in (*stops, None):
            ended = job(folder / "cut", *callbacks, save=True, stop=stop, **options)
            assert (ended is None) == (stop is not None)
            assert stop is None or load_whole(folder / "cut" / "last.ckpt")["global_step"] == stop
        return whole

    ranks = on_ranks(both, timeout_s=200)
    one, other = (load_whole(folder / name / "last.ckpt") for name in ("whole", "cut"))
    assert one["global_step"] == other["global_step"] == 18
    found = []
    _compare(one, other, path="", found=found)
    return found, ranks


@pytest.mark.support(method="unstructured", strategy="fsdp2", feature="resume")
def test_two_processes_resume_bit_equal(tmp_path):
    assert resumed(tmp_path, *RUNS["fine"], stops=(3, 9))[0] == []


@pytest.mark.support(method="structured", strategy="fsdp2", feature=["structure", "loss", "resume"])
def test_two_processes_remove_what_one_does_and_resume_bit_equal(tmp_path):
    options = {"make": convolutions, "features": 16}
    differing, ranks = resumed(tmp_path, SHRINK, stops=(1, 5, 8), **options)
    assert differing == []
    one = job(tmp_path, SHRINK, ranks=1, **options)
    assert one["states"][0]["is_shrunk"]
    close(one, ranks)


REWINDING = partial(Prune, schedule=Iterative(rounds=3, rewind_to=0.3), start="1 steps", end="13 steps", include=["0"])
SOLVED = partial(
    Prune, solver=SparseGPT(), observe_steps=2, start="3 steps", end="3 steps", sparsity=0.5, include=["3"]
)


@pytest.mark.support(method="unstructured", strategy="fsdp2", feature=["masks", "loss", "resume"])
def test_rewinding_and_solving_do_what_they_do_in_one_process_and_resume_bit_equal(tmp_path):
    differing, ranks = resumed(tmp_path, REWINDING, SOLVED, stops=(5,))
    assert differing == []
    close(job(tmp_path, REWINDING, SOLVED, ranks=1), ranks, rtol=1e-4, atol=1e-6)  # what a solver reads is float32


@pytest.mark.support(method=["structured", "unstructured"], strategy="fsdp2", feature="resume")
def test_a_pruner_goes_on_after_another_has_cut_the_network(tmp_path):
    callbacks = (SHRINK, partial(Prune, end=0.9, criterion=Snip(), observe_steps=3))
    assert resumed(tmp_path, *callbacks, stops=(10,), make=convolutions, features=16)[0] == []


@pytest.mark.support(method="unstructured", strategy=["one", "fsdp2"], feature="elsewhere")
def test_what_several_processes_have_saved_one_goes_on_with_and_the_other_way_round(tmp_path):
    whole = job(tmp_path, SNIP, ranks=1)
    for first, second in ((2, 1), (1, 2)):
        folder = tmp_path / str(first)
        on_ranks(lambda: job(folder, SNIP, ranks=first, save=True, stop=5), ranks=first)  # noqa: B023
        ends = on_ranks(lambda: job(folder, SNIP, ranks=second, save=True), ranks=second)  # noqa: B023
        same_masks(whole, ends[0])
        for name, value in whole["weights"].items():
            torch.testing.assert_close(ends[0]["weights"][name], value, rtol=1e-5, atol=1e-7)


class Stack(torch.nn.Module):
    """Layers in a list, some of which leave."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4))
        self.head = torch.nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.mark.support(method="structured", strategy="fsdp2", feature=["structure", "loss", "resume"])
def test_layers_leave_as_they_do_in_one_process_and_resume_bit_equal(tmp_path):
    example = torch.randn(16, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drop = partial(PruneDepth, 2, at="5 steps", position="all", example_inputs=example)
    options = {"make": lambda: Doubled(Stack())}
    differing, ranks = resumed(tmp_path, drop, stops=(7,), **options)
    assert differing == []
    one = job(tmp_path, drop, ranks=1, **options)
    assert one["states"][0]["done"]["after"] < one["states"][0]["done"]["before"]
    assert ranks[0]["states"] == one["states"]
    close_values(one, ranks)


class ShardsItself(Doubled):
    """Somebody's module under Lightning's own strategy."""

    def configure_model(self):
        if getattr(self, "_device_mesh", None) is not None:
            for part in (self.net[0], self.net[3], self.net):
                fully_shard(part, mesh=self._device_mesh["data_parallel"])


def shards_itself():
    net = Mlp(width=20)
    net[2].p = 0.0
    return ShardsItself(net)


def test_what_shards_itself_is_pruned_alike_and_not_cut(tmp_path):
    own = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
    ranks = on_ranks(lambda: job(tmp_path, *RUNS["lamp"], strategy=own, make=shards_itself)["states"])
    same_masks(job(tmp_path, *RUNS["lamp"], ranks=1), {"states": ranks[0]})
    with pytest.raises(ConfigError, match=r"ModelParallelStrategy does not go with pattern=Structures.*strategy=fsdp2"):
        check_pair(own(), SHRINK())
