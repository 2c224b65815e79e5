"""Prune a trained model at once: solvers that rewrite what is left, and the walk through a model's layers."""

from lightning_opt.pruning.oneshot import prune_weight, prune_with
from lightning_opt.pruning.sparse_gpt import MaskChooser, SlabChooser, SparseGPT

__all__ = ["MaskChooser", "SlabChooser", "SparseGPT", "prune_weight", "prune_with"]
