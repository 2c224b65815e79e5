"""Two processes, ddp and FSDP2: quantizers are the same on all ranks, and those of one process with the whole batch."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from prune_job import Stranger, dataset, fit, make_run
from quantize_job import FEATURES, QAT, Residual, answers, converted, state_of
from test_prune_ddp import run_two
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_opt.callbacks import Quantize
from lightning_opt.checkpointing import find_checkpoint
from lightning_opt.quantization.observers import MinMax, Percentile
from lightning_opt.quantization.post_training import quantize
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.testing.ranks import on_ranks
from lightning_opt.testing.resume import KillAfter, compare_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
MIN_MAX = partial(QAT, scheme=Scheme(activation_observer=MinMax()))
HISTOGRAM = partial(QAT, scheme=Scheme(activation_observer=Percentile(q=0.99)))
LSQ = partial(QAT, scheme="w4a8_lsq")


class Keep(pl.Callback):
    """Writes down what this rank's quantizers are after each batch."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(state_of(pl_module.net))

    def on_train_end(self, trainer, pl_module):
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.seen, self.folder / f"rank-{trainer.global_rank}.pt")


def module():
    # batch statistics and dropout would be each process's own
    return Stranger(
        Residual(norm=nn.Identity, dropout=0.0).double(), make=partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    )


def job(folder, *callbacks, stop=None, ranks=2, **options):
    callbacks = [*callbacks, partial(Keep, folder), *([partial(KillAfter, stop)] if stop else [])]
    options |= {"devices": 2, "strategy": "ddp"} if ranks > 1 else {}
    run = make_run(folder, *callbacks, module=module, features=FEATURES, precision="64-true", **options)
    fit(run, resume=find_checkpoint(folder))


def seen(folder, rank=0):
    return torch.load(folder / f"rank-{rank}.pt", weights_only=True)


def close(first, second, *, rtol):
    """Compare scales; those of activations are at most a few batches' extremes apart."""
    scales = [{name: value for name, value in state.items() if name.endswith("scale")} for state in (first, second)]
    assert len(scales[0]) >= 8
    assert all(not torch.equal(value, torch.ones_like(value)) for value in scales[0].values())
    same(scales[:1], scales[1:], rtol=rtol, atol=1e-6)


def same(first, second, **tolerance):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if tolerance:
                torch.testing.assert_close(
                    value, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
                )
            else:
                assert torch.equal(value, other[name]), name


@pytest.mark.support(method="qat", strategy="ddp", feature="quantizers")
@pytest.mark.parametrize(
    ("quantize", "rtol"),
    [(QAT, 0.4), (MIN_MAX, 1e-4), (HISTOGRAM, 0.05), (LSQ, 0.4)],
    ids=["qat", "max", "hist", "lsq"],
)
def test_all_ranks_have_the_quantizers_that_one_process_has(tmp_path, quantize, rtol):
    two, one = tmp_path / "two", tmp_path / "one"
    assert run_two(lambda: job(two, quantize)) == [0, 0]
    same(seen(two, 0), seen(two, 1))
    job(one, quantize, ranks=1)
    close(seen(one)[-1], seen(two)[-1], rtol=rtol)


def test_learned_scales_have_learned_what_one_process_learns(tmp_path):
    """The gradients of both ranks are averaged, as DDP does for what it knows of."""
    folders = tmp_path / "two", tmp_path / "one"
    soon = {"start": "1 steps", "freeze_observers": "1 steps", "freeze_batch_norm": None}
    begin = partial(QAT, scheme="w4_lsq", **soon)
    assert run_two(lambda: job(folders[0], begin, max_steps=4)) == [0, 0]
    job(folders[1], begin, max_steps=4, ranks=1)
    two, one = seen(folders[0]), seen(folders[1])
    same(one, two, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(two[0][name], two[-1][name]) for name in two[0] if name.endswith("scale"))


@pytest.mark.support(method="qat", strategy="ddp", feature="resume")
def test_two_processes_resume_bit_equal(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_two(lambda: job(whole, LSQ)) == [0, 0]
    for stop in (5, 9):
        assert 1 in run_two(lambda stop=stop: job(cut, LSQ, stop=stop))
    assert run_two(lambda: job(cut, LSQ)) == [0, 0]
    assert compare_checkpoints(whole / "last.ckpt", cut / "last.ckpt") == []


class Sharded(Stranger):
    """Somebody's module under FSDP2: each layer is a group of its own."""

    def __init__(self):
        super().__init__(Residual(norm=nn.Identity, dropout=0.0), make=partial(torch.optim.SGD, lr=0.05, momentum=0.9))

    def configure_model(self):
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None:
            return
        for part in (self.net.stem, self.net.one, self.net.two, self.net):
            fully_shard(part, mesh=mesh["data_parallel"])


class KeepSharded(Keep):
    def on_train_batch_end(self, trainer, pl_module, *_):
        found = state_of(pl_module.net)
        self.seen.append({n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in found.items()})

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        weights = {n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in pl_module.state_dict().items()}
        torch.save(weights, self.folder / f"weights-{trainer.global_rank}.pt")


def sharded_job(folder, quantize, *, ranks=2):
    options = {"devices": 2, "strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    run = make_run(
        folder,
        quantize,
        partial(KeepSharded, folder),
        module=Sharded,
        features=FEATURES,
        save=False,
        **(options if ranks > 1 else {}),
    )
    fit(run)


@pytest.mark.parametrize(("quantize", "rtol"), [(MIN_MAX, 0.01), (LSQ, 0.4)], ids=["min_max", "lsq"])
def test_sharded_ranks_have_the_quantizers_that_one_process_has(tmp_path, quantize, rtol):
    two, one = tmp_path / "two", tmp_path / "one"
    assert run_two(lambda: sharded_job(two, quantize)) == [0, 0]
    same(seen(two, 0), seen(two, 1))
    sharded_job(one, quantize, ranks=1)
    close(seen(one)[-1], seen(two)[-1], rtol=rtol)


def test_what_was_sharded_converts(tmp_path):
    assert run_two(lambda: sharded_job(tmp_path, QAT)) == [0, 0]
    run = make_run(tmp_path, QAT, module=Sharded, features=FEATURES, save=False, max_steps=14)
    fit(run)
    run.module.load_state_dict(torch.load(tmp_path / "weights-0.pt", weights_only=True))
    assert torch.equal(answers(converted(run.module.net)), answers(run.module.net))


@pytest.mark.support(method="ptq", strategy="ddp", feature=["trains", "quantizers"])
def test_after_training_all_processes_have_what_the_last_weights_and_the_first_samples_give(tmp_path):
    """The outside reference: the checkpoint's weights, quantized by hand in one process."""
    after = partial(Quantize, method="post_training", calibration_samples=24)

    def both():
        run = make_run(
            tmp_path, after, module=module, features=FEATURES, precision="64-true", devices=2, strategy="ddp"
        )
        fit(run)
        return answers(run.module.net.float())

    first, second = on_ranks(both)
    assert torch.equal(first, second)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    net = Residual(norm=nn.Identity, dropout=0.0).double()
    net.load_state_dict({name.removeprefix("net."): value for name, value in saved.items()})
    samples = dataset(FEATURES).tensors[0][:24].double()
    expected = quantize(net, samples[:2], "w8a8", calibration=samples.split(4), convert=False)
    assert torch.equal(answers(expected.float()), first)
    assert (tmp_path / "quantized.ckpt").is_file()
