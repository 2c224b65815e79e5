"""How a run is spread over devices."""

from lightning_opt.strategies.ddp import auto, ddp

__all__ = ["auto", "ddp"]
