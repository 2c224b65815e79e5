"""FSDP2 and compile on accelerators: step time, memory and MFU of a 300M-parameter causal LM, with and without teacher.

    python experiments/parallel_speed/run.py --gpu                                      # one accelerator
    torchrun --nproc-per-node 8 experiments/parallel_speed/run.py --gpu                 # eight

Written for CUDA and NCCL; it has not been run yet, for want of an accelerator.
"""

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_opt.losses import KD, Term
from lightning_opt.models import GPT
from lightning_opt.modules import Distillation, Supervised, Teacher
from lightning_opt.strategies.sharded_presets import fsdp2
from lightning_opt.tasks import LanguageModeling

VOCAB, LENGTH, BATCH = 32_000, 1024, 16  # sequences of each process
WARM_UP, STEPS = 10, 30
# Dense bf16, from the vendors' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


class Random:
    """Ready batches of random tokens on the host."""

    def __init__(self, seed: int) -> None:
        tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def __len__(self) -> int:
        return WARM_UP + STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch for _ in range(len(self)))


class Clock(pl.Callback):
    """Time each step, waiting for the device; the peak of memory is that of the steps that count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        self._begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.cuda.synchronize()
        if batch_idx >= WARM_UP:
            self.seconds.append(time.perf_counter() - self._begun)


def student() -> GPT:
    return GPT(vocab_size=VOCAB, context_length=LENGTH, dim=1024, depth=22, heads=16)


def teacher() -> GPT:
    return GPT(vocab_size=VOCAB, context_length=LENGTH, dim=1536, depth=24, heads=16)


def flops_per_token(net: GPT) -> float:
    """Return what a forward costs (Chowdhery et al. 2022, arXiv 2204.02311, appendix B); a backward twice that."""
    weights = sum(p.numel() for p in net.parameters()) - net.position_embedding.weight.numel()
    depth, dim = len(net.blocks), net.token_embedding.embedding_dim
    return 2.0 * weights + 4.0 * depth * LENGTH * dim


def measure(*, compiled: bool, taught: bool) -> dict[str, Any]:
    """Train some steps with FSDP2 and return the median step, the peak of memory and the MFU."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net, wide = student(), teacher() if taught else None
    useful = 3.0 * flops_per_token(net) + (flops_per_token(wide) if wide is not None else 0.0)
    if compiled:
        blocks: list[nn.Module] = [*net.blocks, *(wide.blocks if wide is not None else [])]
        for block in blocks:
            block.compile()
    clock = Clock()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        accelerator="cuda",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=world // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=fsdp2(),
        precision="bf16-mixed",
        max_epochs=1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock],
    )
    trainer.fit(_module(net, wide), Random(rank))
    seconds = statistics.median(clock.seconds)
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
    return {
        "compiled": compiled,
        "teacher": taught,
        "processes": world,
        "step_ms": seconds * 1e3,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
        "tokens_per_s": world * BATCH * LENGTH / seconds,
        "mfu": None if peak is None else useful * BATCH * LENGTH / seconds / peak,
    }


def _module(net: GPT, wide: GPT | None) -> pl.LightningModule:
    task, optimizer = LanguageModeling(num_outputs=VOCAB), partial(torch.optim.AdamW, lr=1e-4, fused=True)
    if wide is None:
        return Supervised(net, task=task, optimizer=optimizer)
    taught = Teacher(wide, dtype="bfloat16")
    return Distillation(net, taught, task=task, losses=[Term(KD(temperature=2.0))], optimizer=optimizer)


def main(path: Path) -> int:
    """Measure all four and write them down; exit code 2 without an accelerator."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 2
    rows = []
    for taught in (False, True):
        for compiled in (False, True):
            torch.compiler.reset()
            rows.append(measure(compiled=compiled, taught=taught))
            if int(os.environ.get("RANK", "0")) == 0:
                print(json.dumps(rows[-1]), flush=True)
    if int(os.environ.get("RANK", "0")) == 0:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0
