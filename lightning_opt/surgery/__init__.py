"""Edits to a model's structure as data: write them down, and replay them on a fresh model."""

from lightning_opt.surgery.edits import Edit, edit_from_dict
from lightning_opt.surgery.layers import DropLayers
from lightning_opt.surgery.recipe import Recipe, replay

__all__ = ["DropLayers", "Edit", "Recipe", "edit_from_dict", "replay"]
