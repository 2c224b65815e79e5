"""From a model whose values are rounded to one that holds integers, and from there to a float model to compare with."""

import copy

from torch import nn

from lightning_opt.quantization.edits import Convert, QuantizeEdit, SwitchOn
from lightning_opt.quantization.layers.conversion import to_float
from lightning_opt.quantization.sites import restore_owner
from lightning_opt.quantization.state import is_converted, is_quantized, quantizers
from lightning_opt.surgery.model_recipe import ATTRIBUTE, recipe_of, record
from lightning_opt.surgery.recipe import Recipe


def convert(model: nn.Module) -> nn.Module:
    """Put integers in place of the rounded weights of `model`, in place, and write that down in its recipe.

    The answers in eval mode stay what they are, bit for bit. A model that is converted already stays as it is.

    Returns:
        `model`.

    Raises:
        ValueError: Nothing is quantized, a quantizer is switched off, or one has not seen any values.
    """
    if is_converted(model):
        return model
    if not is_quantized(model):
        raise ValueError(f"{type(model).__name__} has no quantizers; insert them with prepare() before convert()")
    for name, quantizer in quantizers(model).items():
        if not quantizer.enabled:
            raise ValueError(f"quantizer {name!r} is switched off; switch_on(model) before convert()")
        follows = name.endswith("weight_quantizer") and quantizer.observing and not quantizer.learnable
        if not (follows or quantizer.is_fitted):
            raise ValueError(f"quantizer {name!r} has not seen any values; calibrate or train before convert()")
    edit = Convert()
    edit.apply(model)
    record(model, edit)
    return model


def float_twin(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without quantizers: what to compare speed and size with.

    Integers become the float weights that they stand for; batch norms that are part of a layer stay part of it.
    """
    twin = copy.deepcopy(model)
    take_out(twin)
    edits = [edit for edit in recipe_of(twin) if not isinstance(edit, QuantizeEdit | SwitchOn | Convert)]
    if ATTRIBUTE in vars(twin):
        vars(twin)[ATTRIBUTE] = Recipe(edits)
    return twin


def take_out(model: nn.Module) -> None:
    """Take every quantizer out of `model`, in place; the recipe is left to the caller."""
    for module in list(model.modules()):
        restore_owner(module)
    to_float(model)
