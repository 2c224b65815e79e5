"""Pipeline parallelism: each process runs a part of the network's layers, on one micro-batch after the other.

The strategy is imported when it is first used: to cut a network needs no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_opt.strategies.pipeline.bubble import Bubble, Clock, bubble_report, simulate
from lightning_opt.strategies.pipeline.split import split
from lightning_opt.strategies.pipeline.stages import Cut, Stage, keep_only

if TYPE_CHECKING:
    from lightning_opt.strategies.pipeline.strategy import PipelineStrategy, pipeline

__all__ = [
    "Bubble",
    "Clock",
    "Cut",
    "PipelineStrategy",
    "Stage",
    "bubble_report",
    "keep_only",
    "pipeline",
    "simulate",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in ("PipelineStrategy", "pipeline"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.strategy"), name)
