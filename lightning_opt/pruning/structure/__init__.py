"""Which parts of a model can be cut together, proved from its traced program."""

from lightning_opt.pruning.structure import contraction, layers, pointwise, recurrent, reshaping  # noqa: F401  rules
from lightning_opt.pruning.structure.groups import Group, Member, Refusal
from lightning_opt.pruning.structure.structure import Structure
from lightning_opt.pruning.structure.tracing import trace
from lightning_opt.pruning.structure.walk import operation

__all__ = ["Group", "Member", "Refusal", "Structure", "operation", "trace"]
