"""How a run is spread over devices."""

from lightning_opt.strategies.ddp import auto, ddp
from lightning_opt.strategies.pipeline import PipelineStrategy
from lightning_opt.strategies.sharded import ShardedStrategy
from lightning_opt.strategies.sharded_presets import fsdp2, fsdp2_tp, tensor_parallel

__all__ = [
    "PipelineStrategy",
    "ShardedStrategy",
    "auto",
    "ddp",
    "fsdp2",
    "fsdp2_tp",
    "tensor_parallel",
]
