"""Runs that several processes save: resumed as if never stopped, and under any other strategy or world size."""

import copy
import json
import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from kill_job import Net, make_run
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException
from sharded_job import HALF, STEPS, STRATEGIES, Texts, make_trainer, network, train
from torch.utils.data import DataLoader, Dataset

from lightning_opt.callbacks import Prune, Quantize
from lightning_opt.checkpointing import (
    ShardedCheckpoint,
    callback,
    find_checkpoint,
    load_state,
    load_whole,
)
from lightning_opt.checkpointing.consolidate import consolidate
from lightning_opt.checkpointing.files import require_free_space
from lightning_opt.checkpointing.stored import Stored, StoredState
from lightning_opt.checkpointing.tree import decode, encode
from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.models import TextEncoder
from lightning_opt.modules import Supervised
from lightning_opt.pruning import shrink
from lightning_opt.strategies.sharded_presets import fsdp2
from lightning_opt.surgery import recipe_of
from lightning_opt.tasks import Classification
from lightning_opt.testing.ranks import on_ranks
from lightning_opt.testing.resume import check_resume, compare_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 2e-5  # of weights after ten steps of AdamW, which may turn rounding into a fraction of a step
WRITERS = ["one", "ddp", "fsdp2", "tensor", "both", "pipeline"]
CROSSINGS = [
    ("fsdp2", "one"),
    ("tensor", "one"),
    ("both", "one"),
    ("pipeline", "one"),
    ("one", "fsdp2"),
    ("ddp", "fsdp2"),
    ("tensor", "fsdp2"),
    ("both", "fsdp2"),
    ("pipeline", "fsdp2"),
    ("fsdp2", "ddp"),
    ("tensor", "ddp"),
    ("fsdp2", "tensor"),
    ("one", "pipeline"),
    ("fsdp2", "pipeline"),
    ("fsdp2", "fsdp2 on 4"),
    ("ddp", "both"),
    ("pipeline", "pipeline of 4"),
]


def in_ranks(devices, job):
    return [job()] if devices == 1 else on_ranks(job, ranks=devices, timeout_s=200)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), "one", STEPS)["weights"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a checkpoint of each writer, half-way."""
    folder = tmp_path_factory.mktemp("stopped")
    for devices in (1, 2, 4):
        names = [name for name in WRITERS if STRATEGIES[name][0] == devices]
        in_ranks(devices, lambda names=names: [train(folder / name, name, HALF) for name in names] and None)
    return folder


@pytest.fixture(scope="module")
def resumed(stopped, tmp_path_factory):
    """What each reader made of each writer's checkpoint, by rank."""
    folder, found = tmp_path_factory.mktemp("resumed"), {}
    for devices in (1, 2, 4):
        pairs = [pair for pair in CROSSINGS if STRATEGIES[pair[1]][0] == devices]

        def job(pairs=pairs):
            return [
                train(folder / f"{writer} {reader}", reader, STEPS, resume=find_checkpoint(stopped / writer))
                for writer, reader in pairs
            ]

        ranks = in_ranks(devices, job)
        found |= {pair: [rank[number] for rank in ranks] for number, pair in enumerate(pairs)}
    return found


@pytest.mark.parametrize("writer", WRITERS)
def test_what_each_strategy_saves_is_the_whole_model(stopped, writer, uninterrupted):
    path = stopped / writer / "last.ckpt"
    assert path.read_bytes().startswith(b"{") == (writer not in ("one", "ddp"))
    saved = load_whole(path) if writer not in ("one", "ddp") else torch.load(path, weights_only=True)
    reference = torch.load(stopped / "one" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == reference["state_dict"].keys()
    for name, value in reference["state_dict"].items():
        assert torch.allclose(saved["state_dict"][name], value, rtol=0, atol=TOLERANCE), name
    (one,), (other,) = saved["optimizer_states"], reference["optimizer_states"]
    assert [group["params"] for group in one["param_groups"]] == [group["params"] for group in other["param_groups"]]
    assert [group["lr"] for group in one["param_groups"]] == [1e-3, 2e-3]
    assert one["state"].keys() == other["state"].keys()
    for number, state in other["state"].items():
        assert state.keys() == one["state"][number].keys()
        for key, value in state.items():
            assert torch.allclose(one["state"][number][key], value, rtol=0, atol=TOLERANCE), (number, key)
    assert saved["global_step"] == HALF


@pytest.mark.support(
    method="supervised",
    strategy=["one", "ddp", "fsdp2", "tensor_parallel", "fsdp2_tp", "pipeline"],
    feature="elsewhere",
)
@pytest.mark.parametrize(("writer", "reader"), CROSSINGS)
def test_any_strategy_goes_on_from_any_checkpoint(resumed, uninterrupted, writer, reader):
    for rank in resumed[writer, reader]:
        assert rank["step"] == STEPS
        for name, value in uninterrupted.items():
            assert torch.allclose(rank["weights"][name], value, rtol=0, atol=TOLERANCE), name


def test_the_tolerance_means_something(uninterrupted, stopped):
    half = torch.load(stopped / "one" / "last.ckpt", weights_only=True)["state_dict"]
    assert max((half[f"model.{name}"] - value).abs().max() for name, value in uninterrupted.items()) > 50 * TOLERANCE


def test_processes_that_share_batches_draw_the_same_numbers_after_another_layout(resumed):
    # as many processes wrote the checkpoint, but they saw different samples: taking their generators would be wrong
    one, other = resumed["fsdp2", "tensor"]
    assert torch.equal(one["random"], other["random"])


def test_consolidated_is_what_one_process_goes_on_from(stopped, tmp_path, resumed):
    out = consolidate(stopped / "both" / "last.ckpt", tmp_path / "one.ckpt")
    assert out.read_bytes()[:2] == b"PK"
    found = train(tmp_path / "run", "one", STEPS, resume=out)["weights"]
    for name, value in resumed["both", "one"][0]["weights"].items():
        assert torch.equal(found[name], value), name


# --- bit for bit


class Plain(Net):
    """Without the frozen padding, which nothing trains."""

    def __init__(self):
        super().__init__()
        del self.padding


def sharded_run(folder, **options):
    run = make_run(folder, strategy=fsdp2(), devices=2, **options)
    run.module = Plain()
    return run


@pytest.mark.support(method="supervised", strategy="fsdp2", feature="resume")
def test_a_resume_under_fsdp2_is_bit_equal(tmp_path):
    # dropout, batch norm, noise in the forward pass, random augmentation, torchmetrics and epoch sums
    on_ranks(lambda: check_resume(sharded_run, folder=tmp_path, stop_at_steps=[1, (3, 4)]), timeout_s=200)
    assert ShardedCheckpoint(tmp_path / "whole" / "last.ckpt").step == 6
    assert sorted(path.name for path in (tmp_path / "whole").glob("*.ckpt")) == [
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]
    named = {ShardedCheckpoint(path)._index.folder for path in (tmp_path / "whole").glob("*.ckpt")}
    assert {f"shards/{path.name}" for path in (tmp_path / "whole" / "shards").iterdir()} == named


class Asks(pl.Callback):
    """Sends a signal to one rank at a step."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_rank_saves_on_all(tmp_path):
    def job():
        try:
            train(tmp_path, "fsdp2", STEPS, callbacks=[Asks()])
        except SIGTERMException:
            return ShardedCheckpoint(tmp_path / "last.ckpt").step
        return -1

    steps = on_ranks(job, timeout_s=100)
    assert steps[0] == steps[1]
    assert 2 <= steps[0] <= 4  # the end of the epoch


def test_what_callbacks_keep_is_the_same_after_the_tree(tmp_path):
    # generators, half-finished metrics, masks, quantizers, schedulers: all that one process keeps in a single file
    callbacks = [lambda: Prune(sparsity=0.5), lambda: Quantize("w8a8", example_inputs=torch.zeros(2, 6))]
    run = make_run(tmp_path, callbacks=callbacks)
    run.module = Plain()
    run.trainer.fit(run.module, **run.data)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {"Prune", "Quantize", "RngState", "MetricState"} <= {name.split("{")[0] for name in kept["callbacks"]}
    encoded, tensors = encode(kept)
    again = decode(json.loads(json.dumps(encoded, allow_nan=False)), tensors.__getitem__)
    torch.save(again, tmp_path / "again.ckpt")
    assert compare_checkpoints(tmp_path / "last.ckpt", tmp_path / "again.ckpt") == []


def test_too_full_a_disk_is_an_error_on_all_ranks_before_the_first_step(tmp_path):
    def job():
        if os.environ["RANK"] == "0":  # it is the first one that looks
            callback.require_free_space = lambda folder, needed_bytes: require_free_space(folder, needed_bytes=10**18)
        try:
            train(tmp_path, "fsdp2", 2)
        except StorageError as error:
            return str(error)
        return ""

    assert all("checkpoints need about" in one for one in on_ranks(job))
    assert find_checkpoint(tmp_path) is None


def test_the_needed_bytes_are_those_of_all_ranks(tmp_path):
    def job():
        seen = []
        callback.require_free_space = lambda folder, needed_bytes: seen.append(needed_bytes)
        train(tmp_path, "fsdp2", 2)
        return seen

    ((needed,), nothing) = on_ranks(job)
    assert nothing == []
    written = sum(path.stat().st_size for path in (tmp_path / "shards").glob("2-*/*"))
    assert written < needed < 3 * written  # two versions and what a file has beside its tensors


# --- models that were changed, and what is refused


def shrunk():
    model = network()
    shrink(model, {"input_ids": torch.zeros(2, 6, dtype=torch.long)}, ratio=0.5)
    return model


def test_a_changed_model_takes_its_shape_before_it_is_sharded(tmp_path):
    changed = shrunk()

    def job():
        train(tmp_path / "a", "fsdp2", HALF, model=copy.deepcopy(changed))
        fresh = network()
        found = train(tmp_path / "b", "fsdp2", STEPS, model=fresh, resume=find_checkpoint(tmp_path / "a"))
        straight = train(tmp_path / "c", "fsdp2", STEPS, model=copy.deepcopy(changed))
        return [found["weights"], straight["weights"], len(recipe_of(fresh))]

    for found, straight, edits in on_ranks(job, timeout_s=100):
        assert edits == 1
        assert found.keys() == straight.keys()
        assert all(torch.equal(found[name], value) for name, value in straight.items())


def test_averages_are_refused_by_name(tmp_path):
    def job():
        try:
            train(tmp_path, "fsdp2", 2, callbacks=[EMAWeightAveraging()])
        except ConfigError as error:
            return str(error)
        return ""

    assert all("EMAWeightAveraging" in one and "strategy=ddp" in one for one in on_ranks(job))


def test_another_model_is_refused_on_every_rank(stopped, tmp_path):
    wider = {"num_outputs": 3, "vocab_size": 30, "max_length": 6, "dim": 32, "depth": 4, "heads": 4}

    def job():
        try:
            train(tmp_path, "fsdp2", 2, model=TextEncoder(**wider), resume=stopped / "fsdp2" / "last.ckpt")
        except ConfigError as error:
            return str(error)
        return ""

    assert all("has shape" in one and "checkpoint[model." in one for one in on_ranks(job))


class Inputs(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": Texts().ids[index]}


def test_weights_alone_for_judging_under_a_sharded_strategy(stopped, tmp_path):
    path, loader = stopped / "both" / "last.ckpt", DataLoader(Inputs(), batch_size=4)

    def job():
        module = Supervised(network(), task=Classification(num_outputs=3))
        return make_trainer(tmp_path, fsdp2(), 2, 1).predict(module, dataloaders=loader, ckpt_path=path)[0]

    module = Supervised(network(), task=Classification(num_outputs=3))
    load_state(module, load_whole(path)["state_dict"])
    with torch.no_grad():
        expected = module.eval()(next(iter(loader)))
    for answers in on_ranks(job):
        assert torch.allclose(answers, expected, atol=1e-5)


def test_a_state_is_read_when_it_is_looked_at(stopped):
    saved = ShardedCheckpoint(stopped / "fsdp2" / "last.ckpt")
    entries = {name: Stored(saved, f"state_dict.{name}") for name in saved.names("state_dict.")}
    state = StoredState(entries)
    assert len(list(state)) == len(entries)
    assert saved._readers == {}
    name = next(iter(state))
    assert torch.equal(state[name], saved.read(f"state_dict.{name}"))
    state[name] = torch.zeros(1)  # what a hook puts there counts
    assert torch.equal(state[name], torch.zeros(1))
