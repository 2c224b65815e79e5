"""Training in a pipeline is training in one process: losses, metrics, weights, checkpoints."""

import lightning.pytorch as pl
import pytest
import torch
from pipeline_job import Texts, adamw, distance, distillation, encoder, fit, language_model
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_opt.checkpointing.io import DurableCheckpointIO
from lightning_opt.errors import ConfigError
from lightning_opt.losses import CRD, DIST, KD, FitNets, OnPolicy, RKDDistance, SimilarityPreserving
from lightning_opt.modules import Distillation, Supervised
from lightning_opt.strategies import ddp
from lightning_opt.strategies.pipeline import PipelineStrategy, bubble_report
from lightning_opt.tasks import Classification
from lightning_opt.testing.ranks import on_ranks

NEAR = 1e-5
TASK = Classification(num_outputs=3)


def texts():
    return Texts(language_model=True, only_ids=True)


@pytest.mark.support(method=["distil_logit", "distil_feature"], strategy="pipeline", feature="loss")
def test_every_schedule_gives_the_losses_metrics_and_weights_of_one_process():
    """Hints on an early layer and on two, KD, AdamW, clipping, accumulation 2; 54 steps for the usual schedule."""
    long, short = fit(epochs=9, check_val_every_n_epoch=9), fit(epochs=1)
    assert len(long[0]) == 54

    def job():
        found = {"1f1b": distance(long, fit(PipelineStrategy(), 2, epochs=9, check_val_every_n_epoch=9))}
        for schedule in ("gpipe", "interleaved_1f1b", "zero_bubble", "zbv"):
            found[schedule] = distance(short, fit(PipelineStrategy(schedule=schedule), 2, epochs=1))
        return found

    for found in on_ranks(job, ranks=2, timeout_s=120):
        for schedule, apart in found.items():
            assert max(apart) < NEAR, (schedule, apart)


def test_four_stages_give_the_losses_of_one_process():
    wanted = fit(epochs=9, check_val_every_n_epoch=9)
    for found in on_ranks(
        lambda: distance(wanted, fit(PipelineStrategy(), 4, epochs=9, check_val_every_n_epoch=9)),
        ranks=4,
        timeout_s=120,
    ):
        assert max(found) < NEAR


@pytest.mark.support(method="supervised", strategy="pipeline", feature="loss")
def test_tied_weights_uneven_batches_and_padded_tokens_count_as_in_one_process():
    """The last batches are 5 of 8 samples and 6 of 7; tokens that count are spread unevenly over micro-batches."""
    wanted = {
        "tied": fit(make=language_model, data=texts(), epochs=1),
        "uneven": fit(data=Texts(samples=45), epochs=1),
        "unclipped": fit(make=language_model, data=texts(), epochs=1, gradient_clip_val=None),
    }
    assert distance(wanted["tied"], wanted["unclipped"])[0] > 10 * NEAR  # clipping does something

    def job():
        return {
            "tied": distance(wanted["tied"], fit(PipelineStrategy(), 2, make=language_model, data=texts(), epochs=1)),
            "uneven": distance(wanted["uneven"], fit(PipelineStrategy(), 2, data=Texts(samples=45), epochs=1)),
        }

    for found in on_ranks(job, ranks=2, timeout_s=120):
        for case, apart in found.items():
            assert max(apart) < NEAR, (case, apart)


class Halves(Texts):
    """Each data-parallel rank sees every second sample."""

    def _share(self, batch_size):
        ranks = self.trainer.strategy.distributed_sampler_kwargs
        mine = range(ranks["rank"], self.samples, ranks["num_replicas"])
        return DataLoader(Subset(self._rows(), mine), batch_size)

    def train_dataloader(self):
        return self._share(self.batch_size)

    def val_dataloader(self):
        return self._share(6)


@pytest.mark.support(method=["distil_logit", "distil_feature"], strategy="pipeline_ddp", feature="loss")
def test_two_pipelines_side_by_side_are_ddp_of_two_processes():
    wanted = on_ranks(lambda: fit(ddp(), 2, data=Halves(), epochs=1), ranks=2)[0]

    def job():
        return distance(wanted, fit(PipelineStrategy(data_parallel_size=2), 4, data=Halves(), epochs=1))

    for apart in on_ranks(job, ranks=4, timeout_s=120):
        assert max(apart) < NEAR


class Save(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == 3 and index == 5:
            trainer.save_checkpoint(self.path)


@pytest.mark.support(method=["distil_logit", "distil_feature"], strategy=["pipeline", "one"], feature="elsewhere")
def test_a_run_goes_on_from_a_checkpoint_with_more_stages_or_with_none(tmp_path):
    one, two = str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt")
    whole = fit(epochs=2)
    fit(epochs=1, callbacks=[Save(one)])
    rest = (whole[0][6:], *whole[1:])

    def job():
        fit(PipelineStrategy(), 2, epochs=1, callbacks=[Save(two)])
        # other stages than when it was written, and weights that one process wrote
        return [
            distance(rest, fit(PipelineStrategy(schedule="interleaved_1f1b"), 2, ckpt_path=two)),
            distance(rest, fit(PipelineStrategy(), 2, ckpt_path=one)),
        ]

    for found in on_ranks(job, ranks=2, timeout_s=120):
        assert max(max(apart) for apart in found) < NEAR
    assert (tmp_path / "two.ckpt").read_bytes()[:1] == b"{"
    assert max(distance(rest, fit(ckpt_path=two, plugins=[DurableCheckpointIO()]))) < NEAR
    for apart in on_ranks(lambda: distance(rest, fit(PipelineStrategy(), 4, ckpt_path=two)), ranks=4, timeout_s=120):
        assert max(apart) < NEAR


class Seen(pl.Callback):
    """Notes what a process holds while it trains."""

    def on_train_start(self, trainer, module):
        self.names = [name for name, _ in module.named_parameters()]
        self.moments = len(trainer.optimizers[0].param_groups[0]["params"])


def test_a_process_holds_its_own_layers_while_it_trains_and_all_of_them_afterwards():
    names = [name for name, _ in distillation().named_parameters()]

    def job():
        seen, strategy = Seen(), PipelineStrategy(split=["blocks.2"])
        strategy.clock.is_on = True
        _, _, state = fit(strategy, 2, epochs=1, precision="bf16-mixed", callbacks=[seen])
        report = bubble_report(strategy)
        return {"names": seen.names, "moments": seen.moments, "after": list(state), "measured": report.measured,
                "ideal": report.ideal}  # fmt: skip

    first, second = on_ranks(job, ranks=2, timeout_s=120)
    assert not any("blocks.2" in name or "head" in name for name in first["names"])
    assert not any("blocks.1" in name or "embedding.weight" in name for name in second["names"])
    # the projector of the early hint is trained where the hint is
    assert any(name.startswith("terms.1") for name in first["names"])
    assert any(name.startswith("terms.2") for name in second["names"])
    assert first["moments"] == len(first["names"])
    assert set(names) <= set(first["after"])
    assert first["after"] == second["after"]
    # 1F1B, 2 stages and 4 micro-batches: (2 - 1) / (4 + 2 - 1) of the time is waited
    assert first["ideal"] == pytest.approx([0.2, 0.2])
    assert all(0 < share < 1 for share in first["measured"])


class Shuffled(Texts):
    """As a stranger's loader shuffles: by the process's own random state."""

    def train_dataloader(self):
        return DataLoader(self._rows(), self.batch_size, shuffle=True)


class ByRank(Texts):
    def train_dataloader(self):
        return DataLoader(Subset(self._rows(), range(self.trainer.global_rank, self.samples, 2)), self.batch_size)


def forgetful():
    torch.manual_seed(0)
    model = encoder()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    return Supervised(model, task=TASK, optimizer=adamw)


class Drawn(pl.Callback):
    """Keeps what the first micro-batch's forward of this process draws from."""

    def on_train_start(self, trainer, module):
        self.seeds = []
        part = module.model.get_submodule("embedding_dropout" if trainer.global_rank == 0 else "dropout")
        part.register_forward_hook(lambda *_: self.seeds.append(torch.initial_seed()))


def test_processes_drop_other_values_and_yet_shuffle_alike():
    def job():
        torch.manual_seed(5)
        drawn = Drawn()
        steps, _, _ = fit(PipelineStrategy(), 2, make=forgetful, data=Shuffled(), callbacks=[drawn])
        state = torch.get_rng_state()
        with pytest.raises(ConfigError, match="were given different batches"):
            fit(PipelineStrategy(), 2, data=ByRank(), epochs=1)
        return state, drawn.seeds[1], steps  # the first run is a trial, for shapes

    first, second = on_ranks(job, ranks=2, timeout_s=120)
    assert torch.equal(first[0], second[0])
    assert first[1] != second[1]
    still = fit(make=lambda: Supervised(encoder(), task=TASK, optimizer=adamw), epochs=1)[0]
    assert abs(first[2][0][0] - still[0][0]) > 100 * NEAR  # something is dropped


class Own(Supervised):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


class Stranger(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return self.model(batch["input_ids"].float()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def compiled():
    module = Supervised(encoder(), task=TASK)
    module.model.compile()
    return module


def taught(loss, **options):
    return Distillation(encoder(), encoder(), task=TASK, losses=[KD(), loss], optimizer=adamw, **options)


@pytest.mark.support(method="distil_relation", strategy=["pipeline", "pipeline_ddp"], feature="pair", refused=True)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Stranger, "Stranger is no TaskModule"),
        (lambda: Own(encoder(), task=TASK), "Own defines training_step itself"),
        (compiled, "TextEncoder and cannot take one that is compiled"),
        (lambda: taught(RKDDistance()), "loss.terms.rkd_distance: RKDDistance compares"),
        (lambda: taught(DIST()), "DIST compares"),
        (lambda: taught(SimilarityPreserving({"blocks.1": "blocks.1"})), "SimilarityPreserving compares"),
        (lambda: taught(CRD(n_data=48)), "CRD compares"),
        (lambda: taught(FitNets({"head": "head"}), sampling=OnPolicy(fraction=0.5)), "loss.sampling.source=student"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_by_name(make, words):
    with pytest.raises(ConfigError, match=words):
        PipelineStrategy().check_module(make())
