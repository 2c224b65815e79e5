"""What was done to a model so far: the recipe that the model itself carries, and its replay on another model.

The recipe is a plain attribute of the module: it survives deepcopy and pickle, and is in no state dict.
"""

from torch import nn

from lightning_opt.surgery.edits import Edit
from lightning_opt.surgery.recipe import Recipe

ATTRIBUTE = "_lightning_opt_recipe"


def replay(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Apply the edits of `recipe` to a fresh `model`, in place and in order, write them down in it, and return it.

    Raises:
        ValueError: An edit does not fit the model; the message holds its number, from 0.
    """
    for place, edit in enumerate(recipe):
        before = recipe_of(model)
        try:
            model = edit.apply(model)
        except ValueError as error:
            raise ValueError(f"edit {place} ({edit.op}) of the recipe does not fit the model: {error}") from error
        _write(model, before.append(edit))
    return model


def recipe_of(model: nn.Module) -> Recipe:
    """Return what was done to this very object since its constructor built it; empty when nothing was.

    Example:
        >>> len(recipe_of(nn.Linear(2, 2)))
        0
    """
    found = vars(_inside(model)).get(ATTRIBUTE)
    return found if isinstance(found, Recipe) else Recipe()


def whole_recipe(model: nn.Module) -> Recipe:
    """Return what was done to a model and to each of its submodules, as one recipe of the whole.

    A submodule's edits are those that were recorded for it alone; they come after those of what is around it.

    Raises:
        ValueError: A submodule was changed by an edit that only fits whole models.
    """
    edits = list(recipe_of(model))
    for path, module in _inside(model).named_modules():
        if path:
            edits += [edit.under(path) for edit in recipe_of(module)]
    return Recipe(edits)


def record(model: nn.Module, edit: Edit) -> None:
    """Write down that `edit` was applied to `model`; an edit object that is written down already is not repeated."""
    recipe = recipe_of(model)
    if not any(known is edit for known in recipe):
        _write(model, recipe.append(edit))


def _write(model: nn.Module, recipe: Recipe) -> None:
    vars(_inside(model))[ATTRIBUTE] = recipe


def _inside(model: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile` wrapper."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
