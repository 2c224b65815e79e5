"""Ours and the hand-written loops as contenders that move block by block in turn, on all processes at once."""

import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import by_hand
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from relay import Body, Lap, Runner, share_one_heap
from setting import BATCH, CLIP, RATE, VOCAB, Batches, network

from lightning_opt.modules import Supervised
from lightning_opt.tasks import LanguageModeling
from lightning_opt.testing.ranks import on_ranks

Seconds = dict[str, list[list[float]]]  # contender: round: [on the clock, on the processor] of one step


class Wait(pl.Callback):
    """Wait for one's turn at the start of each step; end the fit when there is no turn any more."""

    def __init__(self, lap: Lap) -> None:
        self.lap = lap

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.lap():
            trainer.should_stop = True


def ours(make: Callable[[], Any], batches: Batches, lap: Lap, *, alone: bool = False) -> None:
    """Fit with a strategy of ours."""
    warnings.simplefilter("ignore")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if alone else dist.get_world_size(),
        strategy=make(),
        plugins=[LightningEnvironment()] if alone else None,
        max_epochs=1,
        gradient_clip_val=CLIP,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Wait(lap)],
    )
    optimizer = partial(torch.optim.AdamW, lr=RATE)
    trainer.fit(Supervised(network(), task=LanguageModeling(num_outputs=VOCAB), optimizer=optimizer), batches)


def pair(case: str) -> dict[str, Body]:
    """Return ours and the loop by hand of one strategy."""
    from lightning_opt.strategies import ddp
    from lightning_opt.strategies.pipeline import pipeline
    from lightning_opt.strategies.sharded_presets import fsdp2

    rank = dist.get_rank()
    own, whole = Batches(BATCH, seed=rank), Batches(2 * BATCH, seed=0)
    if case == "weak scaling":
        return {
            "alone": lambda lap: ours(lambda: "auto", own, lap, alone=True),
            "two": lambda lap: ours(ddp, own, lap),
        }
    # torch's own cut of the hand-written pipeline is given to ours as well: both compute the same stages
    make = {"ddp": ddp, "fsdp2": fsdp2, "pipeline": partial(pipeline, split=["blocks.3"])}[case]
    batches = whole if case == "pipeline" else own
    return {
        "ours": lambda lap: ours(make, batches, lap),
        "by hand": lambda lap: getattr(by_hand, case)(iter(batches), lap),
    }


def race(case: str, *, rounds: int, block: int) -> list[Seconds]:
    """Return the seconds of each rank, where contenders take turns; all ranks go through the same order."""

    def job() -> Seconds:
        torch.set_num_threads(1)
        share_one_heap()
        turns = dist.new_group()  # apart from what the contenders send
        runners = {name: Runner(name, body, block=block) for name, body in pair(case).items()}
        for runner in runners.values():
            dist.barrier(turns)
            runner.start()
        found: Seconds = {name: [] for name in runners}
        draw = random.Random(0)
        for turn in range(-1, rounds):
            for name in draw.sample(sorted(runners), len(runners)):
                taken = _move(name, runners[name], turns)
                if turn >= 0:
                    found[name].append(taken)
        for runner in runners.values():
            dist.barrier(turns)
            runner.stop()
        return found

    return on_ranks(job, group=True, timeout_s=290.0)


def _move(name: str, runner: Runner, turns: Any) -> list[float]:
    """Let a contender do one block; one that trains alone does so on each rank, while the other waits."""
    taken: list[float] = []
    for rank in (0, 1) if name == "alone" else (None,):
        dist.barrier(turns)
        if rank in (None, dist.get_rank()):
            times = runner.step()
            taken = [times.wall_s, times.cpu_s]
    dist.barrier(turns)
    return taken
