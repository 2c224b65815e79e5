"""Pruning: what goes (patterns), which of it (criteria), how much where (allocations), when (schedules), what is left.

Weights are masked; structures (channels, heads, hidden units, layers) leave the model. `callbacks.Prune` does either
while a model trains.
"""

from lightning_opt.pruning.allocation import ERK, LAMP, Allocation, GlobalAllocation, PerLayer, Uniform
from lightning_opt.pruning.criteria import (
    Activation,
    BatchNormScale,
    Criterion,
    Evidence,
    FirstOrder,
    GroupCriterion,
    GroupNorm,
    Magnitude,
    Movement,
    Random,
    Snip,
    SoftMovement,
    Taylor,
    Wanda,
    score_groups,
    sparsity_penalty,
)
from lightning_opt.pruning.depth import angular_distances, drop_by_angular_distance, drop_by_loss, keep_layers
from lightning_opt.pruning.engine_times import time_in_onnxruntime, time_in_openvino
from lightning_opt.pruning.hugging_face import hugging_face_config, update_config
from lightning_opt.pruning.latency import LatencyAware
from lightning_opt.pruning.layer_times import AnalyticTimes, MeasuredTimes, layers_of
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.oneshot import prune_with
from lightning_opt.pruning.packing import read_sparse, write_sparse
from lightning_opt.pruning.patterns import NM, Block, Columns, Element, Pattern, Rows
from lightning_opt.pruning.regrow import SET, Regrow, RigL
from lightning_opt.pruning.schedules import Cubic, Exponential, Iterative, Linear, OneShot, Schedule
from lightning_opt.pruning.selection import select
from lightning_opt.pruning.sizes import sizes_on_disk
from lightning_opt.pruning.solvers import SparseGPT
from lightning_opt.pruning.statistics import Statistics
from lightning_opt.pruning.structure import Group, Refusal, Structure, trace
from lightning_opt.pruning.structured import choose, shrink
from lightning_opt.pruning.summary import pruning_summary
from lightning_opt.pruning.widths import GlobalSizes, Sizes, Structures, UniformSizes

__all__ = [
    "ERK",
    "LAMP",
    "NM",
    "SET",
    "Activation",
    "Allocation",
    "AnalyticTimes",
    "BatchNormScale",
    "Block",
    "Columns",
    "Criterion",
    "Cubic",
    "Element",
    "Evidence",
    "Exponential",
    "FirstOrder",
    "GlobalAllocation",
    "GlobalSizes",
    "Group",
    "GroupCriterion",
    "GroupNorm",
    "Iterative",
    "LatencyAware",
    "Linear",
    "Magnitude",
    "Masks",
    "MeasuredTimes",
    "Movement",
    "OneShot",
    "Pattern",
    "PerLayer",
    "Random",
    "Refusal",
    "Regrow",
    "RigL",
    "Rows",
    "Schedule",
    "Sizes",
    "Snip",
    "SoftMovement",
    "SparseGPT",
    "Statistics",
    "Structure",
    "Structures",
    "Taylor",
    "Uniform",
    "UniformSizes",
    "Wanda",
    "angular_distances",
    "choose",
    "drop_by_angular_distance",
    "drop_by_loss",
    "hugging_face_config",
    "keep_layers",
    "layers_of",
    "prune_with",
    "pruning_summary",
    "read_sparse",
    "score_groups",
    "select",
    "shrink",
    "sizes_on_disk",
    "sparsity_penalty",
    "time_in_onnxruntime",
    "time_in_openvino",
    "trace",
    "update_config",
    "write_sparse",
]
