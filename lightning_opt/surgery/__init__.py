"""Edits to a model's structure as data: write them down, and replay them on a fresh model."""

from lightning_opt.surgery.edits import Edit, edit_from_dict
from lightning_opt.surgery.layers import DropLayers
from lightning_opt.surgery.model_recipe import recipe_of, record, replay, whole_recipe
from lightning_opt.surgery.optimizers import apply_with_optimizers
from lightning_opt.surgery.recipe import Recipe
from lightning_opt.surgery.shrink import Shrink

__all__ = [
    "DropLayers",
    "Edit",
    "Recipe",
    "Shrink",
    "apply_with_optimizers",
    "edit_from_dict",
    "recipe_of",
    "record",
    "replay",
    "whole_recipe",
]
