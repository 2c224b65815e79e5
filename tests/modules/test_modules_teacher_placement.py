"""Where a teacher lives changes what each rank holds, and nothing of what a student learns."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt.errors import ConfigError
from lightning_opt.losses import KD, FitNets, Term
from lightning_opt.models import GPT, ConvNet, TextEncoder
from lightning_opt.modules import Distillation, Teacher
from lightning_opt.modules.teacher_placement import check_placement
from lightning_opt.strategies import ddp
from lightning_opt.strategies.pipeline.strategy import PipelineStrategy
from lightning_opt.strategies.sharded_presets import fsdp2, tensor_parallel
from lightning_opt.tasks import Classification
from lightning_opt.testing.ranks import on_ranks

TASK = Classification(num_outputs=3)
BLOCKS = 3


def encoder(dim, seed):
    torch.manual_seed(seed)
    return TextEncoder(num_outputs=3, vocab_size=50, max_length=12, dim=dim, depth=BLOCKS, heads=4)


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(float(outputs["loss"]))


class Words(pl.LightningDataModule):
    """Each rank's own half of a few sentences."""

    def setup(self, stage):
        g = torch.Generator().manual_seed(5)
        self.words, self.labels = torch.randint(50, (48, 12), generator=g), torch.randint(3, (48,), generator=g)

    def train_dataloader(self):
        part = self.trainer.strategy.distributed_sampler_kwargs
        rows = slice(part["rank"], None, part["num_replicas"])
        return DataLoader(TensorDataset(self.words[rows], self.labels[rows]), batch_size=4)


def terms():
    hints = FitNets({"blocks.1": "blocks.2"})
    return [Term(KD(temperature=2.0), weight=0.7, name="kd"), Term(hints, weight=0.5, name="hint")]


def fit(strategy, *, teachers=1, steps=4, losses=terms, look=lambda module, trainer: None, **placed):
    """Train a student and return its losses, and what `look` finds while the teacher is where it lives."""
    given = [Teacher(encoder(32, seed), name=f"teacher {seed}", **placed) for seed in range(1, 1 + teachers)]
    module = Distillation(encoder(16, 9), given, task=TASK, losses=losses(), optimizer=torch.optim.AdamW)
    seen, found = Losses(), []

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            found.append(look(pl_module, trainer))

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[seen, Look()],
    )
    trainer.fit(module, Words())
    for teacher in given:
        teacher.release()
    return seen.seen, found[0], given


SPREAD = ("sharded", "tensor_parallel", "pipeline")


def furthest(one, other):
    assert len(one) == len(other) > 0
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def changed(given):
    """Return by how much the teachers differ from what they were."""
    pairs = [(teacher.model, encoder(32, 1 + n)) for n, teacher in enumerate(given)]
    ends = [zip(after.state_dict().values(), before.state_dict().values(), strict=True) for after, before in pairs]
    return max(float((a - b).abs().max()) for both in ends for a, b in both)


def traces(module, trainer):
    """Return what of a teacher is in module, checkpoint and optimizer, and how much of it each rank holds."""
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    of_student = {name for name, _ in encoder(16, 9).named_parameters()}
    of_losses = {name for name, _ in module.terms.named_parameters()}
    wanted = {f"model.{name}" for name in of_student} | {f"terms.{name}" for name in of_losses}
    ours = {id(one) for one in module.teachers[0].answering.parameters()}
    trained = [one for group in trainer.optimizers[0].param_groups for one in group["params"]]
    held = module.teachers[0].held()
    return {
        "in state_dict": bool({*module.state_dict(), *checkpoint["state_dict"]} - wanted),
        "in module": any(id(one) in ours for one in module.parameters()),
        "in optimizer": not {id(one) for one in trained} <= {id(one) for one in module.parameters()} - ours,
        "is module": any("Teacher" in type(part).__name__ for part in module.modules()),
        "held": [held.whole_bytes, held.rank_bytes, held.peak_bytes],
    }


def job(strategy, placements, **options):
    """Compare placements with the replicated teacher under one strategy."""
    replicated, found, _ = fit(strategy(), look=traces, **options)
    results = {"replicated": (0.0, 0.0, found)}
    for placement in placements:
        losses, found, given = fit(strategy(), placement=placement, look=traces, **options)
        results[placement] = (furthest(losses, replicated), changed(given), found)
    return results


@pytest.mark.parametrize(
    ("strategy", "placements"),
    [
        (ddp, SPREAD),
        (fsdp2, ("sharded", "tensor_parallel")),
        (tensor_parallel, ("tensor_parallel",)),
        (PipelineStrategy, ("pipeline", "sharded")),
    ],
)
def test_a_teacher_in_parts_teaches_what_a_whole_one_does(strategy, placements):
    whole = sum(one.numel() * 4 for one in encoder(32, 1).parameters())
    block = sum(one.numel() * 4 for one in encoder(32, 1).blocks[0].parameters())
    most = {"sharded": whole / 2, "tensor_parallel": whole / 2, "pipeline": 2 * block}  # of three blocks a rank has two
    for results in on_ranks(lambda: job(strategy, placements), timeout_s=120):
        for placement, (difference, change, found) in results.items():
            assert difference <= 1e-6, (placement, difference)
            assert change == 0.0, f"{placement}: the teacher did not come back as it was"
            assert not any(found[place] for place in ("in state_dict", "in module", "in optimizer", "is module"))
        held = {placement: found["held"] for placement, (_, _, found) in results.items()}
        assert held.pop("replicated") == [whole, whole, whole]
        for placement, (of, on_a_rank, _) in held.items():
            assert of == whole
            assert most[placement] <= on_a_rank <= most[placement] + 0.1 * whole, placement
        if "sharded" in held:  # while it answers: one block more, and what lies outside the blocks
            assert held["sharded"][1] + block <= held["sharded"][2] < whole


def test_several_teachers_may_live_in_parts():
    def together():
        kd = [Term(KD(temperature=2.0), weight=0.7, name="kd")]
        whole, _, _ = fit(ddp(), teachers=2, steps=3, losses=lambda: list(kd))
        return {
            placement: furthest(fit(ddp(), teachers=2, steps=3, losses=lambda: list(kd), placement=placement)[0], whole)
            for placement in ("sharded", "pipeline")
        }

    for differences in on_ranks(together):
        assert max(differences.values()) <= 1e-6, differences


class Standing:
    """What a placement asks of a strategy: this rank's device and part of the data."""

    root_device = torch.device("cpu")

    def __init__(self, part=None):
        self.world_size = dist.get_world_size()
        self.distributed_sampler_kwargs = {"rank": dist.get_rank() if part is None else part}


def answers_of(network, inputs, taps, *, part=None, **placed):
    """Return what a teacher says in its place, as lists, and what the same network says alone."""
    alone = Teacher(copy.deepcopy(network))
    alone.watch(taps)
    expected = alone(inputs)
    teacher = Teacher(network, **placed)
    teacher(inputs)  # a pipeline is cut by what it was asked before
    teacher.place(Standing(part)).watch(taps)
    said = [teacher(inputs) for _ in range(2)]
    held = teacher.held()
    teacher.release()
    again = teacher(inputs)
    pairs = [(one.features[name], expected.features[name]) for one in said for name in taps]
    pairs += [(one.logits, expected.logits) for one in said]
    return {
        "names": list(said[0].features) == list(expected.features) == [*taps],
        "shapes": all(one.shape == other.shape for one, other in pairs),
        "difference": max(float((one - other).abs().max()) for one, other in pairs),
        "after": float((again.logits - expected.logits).abs().max()),
        "share": held.rank_bytes / held.whole_bytes,
        "peak": (held.peak_bytes or 0) / held.whole_bytes,
    }


def check(found, *, share=0.85):
    for results in found:
        for what, one in results.items():
            assert one["names"], what
            assert one["shapes"], what
            assert one["difference"] <= 2e-6, (what, one)
            assert one["after"] == 0.0, (what, one)
            assert one["share"] < share, (what, one)


def test_each_rank_is_answered_about_its_own_batch_of_any_shape():
    def job():
        rank = dist.get_rank()
        words = torch.randint(50, (5 - 2 * rank, 12 - 5 * rank), generator=torch.Generator().manual_seed(rank))
        inputs = {"input_ids": words, "attention_mask": (words > 4).long()}
        taps = ["blocks.0", "blocks.2", "head:in"]
        return {place: answers_of(encoder(32, 1), inputs, taps, placement=place) for place in SPREAD}

    check(on_ranks(job, group=True))


def test_a_network_that_answers_otherwise_in_parts_is_not_used():
    def job():
        words = torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
        teacher = Teacher(encoder(32, 1), placement="pipeline")
        said = teacher(words).logits
        teacher.place(Standing())
        # Only one rank sees the difference; the others must not go on without it.
        teacher._home.check(words, said)
        try:
            teacher._home.check(words, -said if dist.get_rank() else said)
        except ConfigError as error:
            return str(error)
        return ""

    for said in on_ranks(job, group=True):
        assert "teacher.placement" in said
        assert "does not answer as it does whole" in said


def test_two_copies_on_four_ranks_and_ranks_with_the_same_batch():
    def job():
        rank = dist.get_rank()
        words = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(rank))
        same = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(rank // 2))
        results = {}
        for place in SPREAD:
            results[place] = answers_of(encoder(32, 1), words, ["blocks.1"], placement=place, ranks=2)
            results[f"{place}, same"] = answers_of(
                encoder(32, 1), same, ["blocks.1"], placement=place, ranks=2, part=rank // 2
            )
        return results

    check(on_ranks(job, group=True, ranks=4))


def test_other_networks_tied_weights_and_batch_norm():
    def job():
        g = torch.Generator().manual_seed(dist.get_rank())
        torch.manual_seed(3)
        gpt = GPT(vocab_size=64, context_length=16, dim=32, depth=4, heads=4)  # its table is its head
        cnn = ConvNet(in_channels=1, widths=[8, 16], num_outputs=3)
        with torch.no_grad():
            cnn.train()(torch.randn(16, 1, 12, 12))  # batch statistics of its own
        images, words = torch.randn(4, 1, 12, 12, generator=g), torch.randint(64, (4, 16), generator=g)
        results = {f"gpt {place}": answers_of(gpt, words, ["blocks.1"], placement=place) for place in SPREAD}
        results |= {f"cnn {place}": answers_of(cnn, images, [], placement=place) for place in ("sharded", "pipeline")}
        chain = torch.nn.Sequential(*[torch.nn.Linear(144, 144) for _ in range(6)])  # large layers, no blocks
        results["chain"] = answers_of(chain, images.flatten(1), ["2"], placement="sharded")
        results["chain"]["share"] = results["chain"]["peak"]  # half of all, and one of six layers
        return results

    found = on_ranks(job, group=True)
    check(found, share=0.95)
    assert all(results["chain"]["peak"] == pytest.approx(1 / 2 + 1 / 6, abs=0.01) for results in found)


@pytest.mark.parametrize(
    ("placement", "processes", "options", "said"),
    [
        ("sharded", 1, {}, ["teacher.placement=sharded", "trainer.devices=2"]),
        ("pipeline", 6, {"ranks": 4}, ["teacher.placement=pipeline", "teacher.ranks=4", "6"]),
        ("sharded", 2, {"ranks": 1}, ["teacher.ranks=1"]),
        (None, 2, {"ranks": 2}, ["teacher.ranks=2", "teacher.placement=replicated"]),
        ("tensor_parallel", 2, {"dtype": "int8"}, ["teacher.placement=tensor_parallel", "teacher.dtype=int8"]),
        ("sharded", 2, {"compile": True}, ["teacher.placement=sharded", "teacher.compile"]),
        ("sharded", 2, {"channels_last": True}, ["teacher.placement=sharded", "teacher.channels_last"]),
        ("ranks", 3, {}, ["teacher.placement=ranks", "strategy=ddp"]),
        ("nowhere", 2, {}, ["teacher.placement", "nowhere"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(placement, processes, options, said):
    with pytest.raises(ConfigError) as refusal:
        check_placement(placement, "ddp", processes, **options)
    assert all(part in str(refusal.value) for part in said), str(refusal.value)


def test_what_can_be_is_not_refused():
    for placement in (None, "replicated", *SPREAD):
        check_placement(placement, ddp(), 4, ranks=None)
    check_placement("sharded", fsdp2(), 4, ranks=2, dtype="int8")
    check_placement("replicated", "auto", 1, compile=True, channels_last=True, dtype="int8")


def test_a_network_that_no_plan_cuts_is_refused_with_both_reasons():
    with pytest.raises(ConfigError, match=r"teacher.placement=tensor_parallel, 3 ranks: .*4 heads"):
        Teacher(encoder(32, 1), placement="tensor_parallel").check("ddp", 3)
    with pytest.raises(ValueError, match="placement"):
        Teacher(encoder(32, 1), placement="here")
