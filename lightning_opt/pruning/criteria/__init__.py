"""Criteria: how much each weight, or each structure, is worth keeping."""

from lightning_opt.pruning.criteria.base import Criterion, Evidence
from lightning_opt.pruning.criteria.gradient import Snip, Taylor
from lightning_opt.pruning.criteria.groups import (
    Activation,
    BatchNormScale,
    FirstOrder,
    GroupCriterion,
    GroupNorm,
    Part,
    score_groups,
)
from lightning_opt.pruning.criteria.magnitude import Magnitude
from lightning_opt.pruning.criteria.movement import Movement, SoftMovement
from lightning_opt.pruning.criteria.random import Random
from lightning_opt.pruning.criteria.slimming import sparsity_penalty
from lightning_opt.pruning.criteria.wanda import Wanda

__all__ = [
    "Activation",
    "BatchNormScale",
    "Criterion",
    "Evidence",
    "FirstOrder",
    "GroupCriterion",
    "GroupNorm",
    "Magnitude",
    "Movement",
    "Part",
    "Random",
    "Snip",
    "SoftMovement",
    "Taylor",
    "Wanda",
    "score_groups",
    "sparsity_penalty",
]
