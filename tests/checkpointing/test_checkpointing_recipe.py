"""A model that was cut in mid-fit survives: resumed before, at and after the cut, tested, and loaded by itself."""

import copy
import json
import pickle

import lightning.pytorch as pl
import pytest
import torch
from kill_job import BATCH, EPOCHS, SAMPLES, Net, NoisyData, make_run
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_opt.checkpointing import find_checkpoint, restore_recipes, save_recipes
from lightning_opt.checkpointing.recipe import install
from lightning_opt.errors import ConfigError, UntrustedInputError
from lightning_opt.losses import KD, AttentionTransfer, HiddenStates
from lightning_opt.modules import Distillation, Supervised
from lightning_opt.surgery import DropLayers, Recipe, Shrink, apply_with_optimizers, recipe_of
from lightning_opt.tasks import Classification
from lightning_opt.testing.resume import KillAfter, Killed, check_resume

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = SAMPLES // BATCH
AT, AGAIN = STEPS + 2, 2 * STEPS + 1  # the steps after which the surgeon acts


def narrower(kept):
    entries = {f"0.{name}": {0: kept} for name in ("weight", "bias")}
    entries |= {f"1.{name}": {0: kept} for name in ("weight", "bias", "running_mean", "running_var")}
    sizes = {"0": {"out_features": len(kept)}, "1": {"num_features": len(kept)}, "4": {"in_features": len(kept)}}
    return Shrink(kept={**entries, "4.weight": {1: kept}}, attributes=sizes)


PLAN = {AT: narrower([0, 2, 3, 5, 8, 11, 13, 15]), AGAIN: narrower([1, 2, 5, 6])}


class Surgeon(pl.Callback):
    """Cuts `net` at fixed steps, as a pruner does."""

    def __init__(self, *, installs=True, child="net", state=True):
        self.installs, self.child, self.state = installs, child, state

    def setup(self, trainer, pl_module, stage):
        if self.installs:
            install(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        edit = PLAN.get(trainer.global_step)
        if edit is not None and not any(edit == done for done in recipe_of(getattr(pl_module, self.child))):
            averages = [c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging)]
            apply_with_optimizers(getattr(pl_module, self.child), edit, trainer.optimizers, also=averages)
            if not self.state:
                for optimizer in trainer.optimizers:
                    optimizer.state.clear()


EVERYWHERE = [1, AT, AGAIN, (AT - 1, AT + 1, AGAIN)]


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, EVERYWHERE),
        ({"every_n_steps": 3, "scheduler": "one_cycle"}, [AT, (AT + 1, AGAIN + 2)]),
        ({"averaged": True}, [(AT - 1, AT + 1, AGAIN)]),
    ],
    ids=["adamw", "one_cycle", "averaged"],
)
def test_a_strangers_run_is_resumed_bit_equal_across_cuts(tmp_path, options, stops):
    averaged = options.pop("averaged", False)

    def make(folder):
        return make_run(folder, **options, callbacks=[Surgeon, *([WeightAveraging] if averaged else [])])

    check_resume(make, folder=tmp_path, stop_at_steps=stops)
    state = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    assert state["state_dict"]["net.4.weight"].shape == (2, 4)
    assert [edit["op"] for edit in json.loads(state["recipes"]["net"])] == ["shrink", "shrink"]


def test_without_the_recipe_a_resume_fails(tmp_path):
    run = make_run(tmp_path, callbacks=[lambda: Surgeon(installs=False)])
    run.trainer.callbacks.insert(0, KillAfter(AT + 1))
    with pytest.raises(Killed):
        run.trainer.fit(run.module, **run.data)
    again = make_run(tmp_path, callbacks=[lambda: Surgeon(installs=False)])
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.trainer.fit(again.module, ckpt_path=find_checkpoint(tmp_path), **again.data)


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


class Ours(Supervised):
    """A TaskModule that `load_from_checkpoint` can build without arguments."""

    def __init__(self):
        super().__init__(network(), task=Classification(num_outputs=2))


def our_trainer(folder, **options):
    options = {"max_epochs": EPOCHS, "callbacks": [Surgeon(installs=False, child="model")]} | options
    options["callbacks"] = [*options["callbacks"], ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)]
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )


def loader():
    return DataLoader(NoisyData(), batch_size=BATCH)


@pytest.fixture(scope="module")
def our_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    torch.manual_seed(0)
    module = Ours()
    our_trainer(folder).fit(module, loader())
    return folder / "last.ckpt", module


def test_a_task_module_needs_nothing_more(our_checkpoint, tmp_path):
    path, trained = our_checkpoint
    expected = {name: tuple(value.shape) for name, value in trained.model.state_dict().items()}
    loaded = Ours.load_from_checkpoint(path, weights_only=True)
    assert recipe_of(loaded.model) == recipe_of(trained.model) == Recipe(PLAN.values())
    x = torch.randn(3, 6)
    assert torch.equal(loaded.eval().model(x), trained.cpu().eval().model(x))
    tested = Ours()
    our_trainer(tmp_path).test(tested, loader(), ckpt_path=path, weights_only=True, verbose=False)
    assert {name: tuple(value.shape) for name, value in tested.model.state_dict().items()} == expected
    resumed = Ours()
    trainer = our_trainer(tmp_path, max_epochs=EPOCHS + 1)
    trainer.fit(resumed, loader(), ckpt_path=path, weights_only=True)
    state = trainer.optimizers[0].state[resumed.model[4].weight]
    assert state["exp_avg"].shape == resumed.model[4].weight.shape == (2, 4)
    assert state["step"] == STEPS * (EPOCHS + 1)


def test_only_what_the_live_model_lacks_is_replayed(our_checkpoint):
    checkpoint = torch.load(our_checkpoint[0], weights_only=True)
    module = Ours()
    apply_with_optimizers(module.model, PLAN[AT], [])
    module.on_load_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)  # nothing is lacking now
    assert recipe_of(module.model) == Recipe(PLAN.values())
    module.load_state_dict(checkpoint["state_dict"])


@pytest.mark.parametrize(
    ("done", "words"),
    [
        ([narrower([0, 1, 2])], r"'model'.*differs.*edit 0"),
        ([*PLAN.values(), narrower([0, 1])], r"'model'.*goes on after the checkpoint's 2 with shrink"),
    ],
)
def test_another_structure_is_one_clear_error(our_checkpoint, done, words):
    checkpoint = torch.load(our_checkpoint[0], weights_only=True)
    module = Ours()
    for edit in done:
        apply_with_optimizers(module.model, edit, [])
    before = copy.deepcopy(module.model.state_dict())
    with pytest.raises(ConfigError, match=words):
        module.on_load_checkpoint(checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


def test_recipes_that_do_not_fit_or_are_none_are_refused():
    module, elsewhere = Ours(), {}
    save_recipes(module, elsewhere)
    assert elsewhere == {"recipes": {}}
    with pytest.raises(ConfigError, match=r"'net'.*Ours"):
        restore_recipes(module, {"recipes": {"net": Recipe(PLAN.values()).to_json()}})
    with pytest.raises(ConfigError, match=r"edit 0 .drop_layers.*does not fit"):
        restore_recipes(module, {"recipes": {"model": Recipe([DropLayers("", (0, 9))]).to_json()}})
    for hostile in ([], {"model": 3}, {"model": "[{}]"}):
        with pytest.raises(UntrustedInputError):
            restore_recipes(module, {"recipes": hostile})
    apply_with_optimizers(module.model, PLAN[AT], [])
    restore_recipes(module, {"state_dict": {}})  # a checkpoint that says nothing
    with pytest.raises(ConfigError, match="goes on after the checkpoint's 0"):
        restore_recipes(module, {"recipes": {}})


class WithHooks(Net):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = len(checkpoint["recipes"])

    def on_load_checkpoint(self, checkpoint):
        self.seen = (checkpoint["mine"], self.net[4].in_features)


def test_installing_keeps_the_modules_own_hooks_and_is_done_once():
    module = WithHooks()
    install(module)
    hook = module.on_save_checkpoint
    install(module)
    assert module.on_save_checkpoint is hook
    apply_with_optimizers(module.net, PLAN[AT], [])
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    fresh = WithHooks()
    install(fresh)
    fresh.on_load_checkpoint(checkpoint)
    assert fresh.seen == (1, 8)
    twin = copy.deepcopy(fresh)
    pickle.loads(pickle.dumps(fresh))
    apply_with_optimizers(twin.net, PLAN[AGAIN], [])
    written = {}
    twin.on_save_checkpoint(written)  # of the copy, not of what it was copied from
    assert len(json.loads(written["recipes"]["net"])) == 2


def test_only_features_that_losses_built_parts_for_must_keep_their_width():
    losses = [HiddenStates({"0": "0"}), AttentionTransfer({"2": "2"}), KD()]
    module = Distillation(network(), network(), task=Classification(num_outputs=2), losses=losses)
    assert module.tapped_modules() == ["0"]
    assert Ours().tapped_modules() == []


def test_the_average_of_lightnings_swa_is_changed_too(tmp_path, our_checkpoint):
    swa = StochasticWeightAveraging(swa_lrs=0.01)
    trainer, module = our_trainer(tmp_path, max_epochs=EPOCHS + 1, callbacks=[swa]), Ours()
    trainer.fit(module, loader(), ckpt_path=our_checkpoint[0], weights_only=True)
    assert swa._average_model.model[4].weight.shape == module.model[4].weight.shape == (2, 4)
