"""Which parts of a model can be cut together, proved from its traced program."""

from lightning_opt.pruning.structure import (  # noqa: F401  each brings its rules
    contraction,
    layers,
    picking,
    pointwise,
    recurrent,
    reshaping,
    slicing,
)
from lightning_opt.pruning.structure.calls import operation
from lightning_opt.pruning.structure.groups import Group, Member, Refusal
from lightning_opt.pruning.structure.structure import Structure
from lightning_opt.pruning.structure.tracing import trace

__all__ = ["Group", "Member", "Refusal", "Structure", "operation", "trace"]
