"""Pruning where layers themselves are split, or lie in several processes: the masks of one process."""

from functools import partial

import pytest
import torch
from prune_job import fit, make_run
from test_prune_sharded import Keep, same_masks
from torch.utils.data import TensorDataset

from lightning_opt.callbacks import Prune, PruneDepth, Quantize
from lightning_opt.callbacks.support import check_pair
from lightning_opt.checkpointing import train_loader
from lightning_opt.errors import ConfigError
from lightning_opt.models import TextEncoder
from lightning_opt.modules import Supervised
from lightning_opt.pruning.allocation import GlobalAllocation
from lightning_opt.pruning.criteria import Snip, Wanda
from lightning_opt.pruning.patterns import NM
from lightning_opt.pruning.regrow import RigL
from lightning_opt.pruning.schedules import Cubic
from lightning_opt.pruning.solvers import SparseGPT
from lightning_opt.pruning.structured import Structures
from lightning_opt.strategies.pipeline import pipeline
from lightning_opt.strategies.sharded_presets import fsdp2, fsdp2_tp, tensor_parallel
from lightning_opt.tasks import Classification
from lightning_opt.testing.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

OFTEN = {"start": "2 steps", "end": "6 steps", "every": "2 steps", "sparsity": 0.7}
# several pruners, each of its own layers, so that one training tells of all
PRUNERS = (
    partial(Prune, include=["blocks.0*"], **OFTEN),
    partial(Prune, NM(2, 4), include=["blocks.1.attention*"], **OFTEN),
    partial(Prune, regrow=RigL(), start="2 steps", end="8 steps", every="2 steps", observe_steps=1, include=["head"]),
    partial(
        Prune,
        allocation=GlobalAllocation(),
        criterion=Snip(),
        observe_steps=2,
        include=["blocks.1.up", "blocks.1.down", "token_embedding"],
        **OFTEN,
    ),
)
VOCABULARY, LENGTH, SAMPLES = 30, 6, 48


def texts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    return TensorDataset(ids, ids.sum(1) % 3)


def encoder():
    torch.manual_seed(0)
    net = TextEncoder(num_outputs=3, vocab_size=VOCABULARY, dim=16, depth=2, heads=4, max_length=LENGTH)
    return Supervised(net.double(), task=Classification(num_outputs=3), optimizer=partial(torch.optim.AdamW, lr=3e-3))


def job(folder, *, ranks, strategy=None):
    options = {"devices": ranks, "strategy": strategy()} if strategy else {}
    run = make_run(folder, *PRUNERS, module=encoder, save=False, max_epochs=2, gradient_clip_val=0.5, **options)
    data = run.data["datamodule"]
    data.data = texts()

    def loader():
        replicas = (run.trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        return train_loader(data.data, batch_size=8 // replicas, seed=5, trainer=run.trainer)

    data.train_dataloader, data.val_dataloader = loader, lambda: []
    data.example_inputs = lambda count: data.data.tensors[0][:count]
    states = []
    run.trainer.callbacks.append(Keep(states))
    fit(run)
    return states


@pytest.mark.support(
    method=["unstructured", "n_m"], strategy=["tensor_parallel", "fsdp2_tp", "pipeline"], feature="masks"
)
@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [(tensor_parallel, 2), (partial(fsdp2_tp, tensor_parallel_size=2), 4), (pipeline, 2)],
    ids=["tensor_parallel", "fsdp2_tp", "pipeline"],
)
def test_the_masks_are_those_of_one_process(tmp_path, strategy, ranks):
    many = on_ranks(lambda: job(tmp_path, ranks=ranks, strategy=strategy), ranks=ranks, timeout_s=200)
    one = {"states": job(tmp_path, ranks=1)}
    assert sum(len(state["masks"]["masks"]) for state in one["states"]) == 14
    for states in many:
        same_masks(one, {"states": states})


@pytest.mark.support(
    method=["unstructured", "structured", "qat"],
    strategy=["tensor_parallel", "fsdp2_tp", "pipeline"],
    feature="pair",
    refused=True,
)
@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (tensor_parallel, "tensor_parallel"),
        (partial(fsdp2_tp, tensor_parallel_size=2), "fsdp2_tp"),
        (pipeline, "pipeline"),
    ],
)
@pytest.mark.parametrize(
    ("callback", "argument"),
    [
        (partial(Prune, Structures()), r"pattern=Structures\("),
        (partial(Prune, criterion=Wanda()), "criterion=Wanda"),
        (partial(Prune, solver=SparseGPT()), "solver=SparseGPT"),
        (partial(PruneDepth, 1), "drop=1"),
        (partial(Quantize, "w8a8"), "scheme=w8a8"),
    ],
)
def test_what_needs_whole_layers_is_refused_by_both_names(strategy, name, callback, argument):
    made = strategy()
    with pytest.raises(ConfigError, match=f"strategy={name} does not go with .*{argument}"):
        check_pair(made, callback())


def test_what_goes_is_not_refused():
    for strategy in (fsdp2(), "ddp", "auto"):
        for callback in (Prune(), Prune(Structures()), Prune(criterion=Wanda()), PruneDepth(1), Quantize()):
            check_pair(strategy, callback)
    for strategy in (pipeline(), tensor_parallel()):
        check_pair(strategy, Prune(schedule=Cubic()))
    with pytest.raises(ConfigError, match=r"strategy=fsdp2.*method='post_training'"):
        check_pair(fsdp2(), Quantize(method="post_training"))
    with pytest.raises(ConfigError, match=r"strategy=pipeline does not go with penalty=0\.1"):
        check_pair(pipeline(), Prune(penalty=0.1))
