"""Checkpoints that survive kill -9 at any moment, and runs that continue from them bit for bit."""

from lightning_opt.checkpointing.callback import SaveCheckpoints
from lightning_opt.checkpointing.consolidate import consolidate
from lightning_opt.checkpointing.foreign import make_resumable
from lightning_opt.checkpointing.io import (
    CheckpointDamagedError,
    DurableCheckpointIO,
    load_primitives,
    require_free_space,
    sweep_stale_temps,
)
from lightning_opt.checkpointing.loader import (
    EpochBatchSampler,
    ResumableLoader,
    SeededDataset,
    eval_loader,
    train_loader,
)
from lightning_opt.checkpointing.metrics import MetricState
from lightning_opt.checkpointing.recipe import restore_recipes, save_recipes
from lightning_opt.checkpointing.resume import find_checkpoint
from lightning_opt.checkpointing.rng import RngState
from lightning_opt.checkpointing.sharded import ShardedCheckpoint, load_whole, save_sharded
from lightning_opt.checkpointing.sharded_strategy import ShardedCheckpointing
from lightning_opt.checkpointing.stored import load_state

__all__ = [
    "CheckpointDamagedError",
    "DurableCheckpointIO",
    "EpochBatchSampler",
    "MetricState",
    "ResumableLoader",
    "RngState",
    "SaveCheckpoints",
    "SeededDataset",
    "ShardedCheckpoint",
    "ShardedCheckpointing",
    "consolidate",
    "eval_loader",
    "find_checkpoint",
    "load_primitives",
    "load_state",
    "load_whole",
    "make_resumable",
    "require_free_space",
    "restore_recipes",
    "save_recipes",
    "save_sharded",
    "sweep_stale_temps",
    "train_loader",
]
