"""Checkers that users can run on their own parts. Each is loaded only when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_opt.testing.losses import check_loss
    from lightning_opt.testing.models import ModelCheck, check_model
    from lightning_opt.testing.prune import check_pruner
    from lightning_opt.testing.quantize import check_observer, check_quantizer
    from lightning_opt.testing.ranks import on_ranks
    from lightning_opt.testing.resume import Fit, check_resume, compare_checkpoints

_HOME = {
    "Fit": "resume",
    "ModelCheck": "models",
    "check_loss": "losses",
    "check_model": "models",
    "check_observer": "quantize",
    "check_pruner": "prune",
    "check_quantizer": "quantize",
    "check_resume": "resume",
    "compare_checkpoints": "resume",
    "on_ranks": "ranks",
}

__all__ = [
    "Fit",
    "ModelCheck",
    "check_loss",
    "check_model",
    "check_observer",
    "check_pruner",
    "check_quantizer",
    "check_resume",
    "compare_checkpoints",
    "on_ranks",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
