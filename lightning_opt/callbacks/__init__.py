"""Callbacks: each says when it acts, what it leaves in a checkpoint and which strategies it supports."""

from lightning_opt.callbacks.metrics_csv import LogPosition, MetricsCsv
from lightning_opt.callbacks.non_finite import NonFiniteGuard
from lightning_opt.callbacks.progress import PlainProgress, progress
from lightning_opt.callbacks.prune import Prune
from lightning_opt.callbacks.prune_depth import PruneDepth
from lightning_opt.callbacks.quantize import Quantize

__all__ = [
    "LogPosition",
    "MetricsCsv",
    "NonFiniteGuard",
    "PlainProgress",
    "Prune",
    "PruneDepth",
    "Quantize",
    "progress",
]
