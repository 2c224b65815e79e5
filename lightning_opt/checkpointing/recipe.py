"""Recipes in checkpoints: a model whose structure was changed while it trained is changed again before weights load.

Lightning asks the module first (`on_load_checkpoint`), then loads weights, then makes the optimizers: by then every
shape is that of the checkpoint.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_opt.errors import ConfigError, UntrustedInputError
from lightning_opt.surgery import Recipe, recipe_of, replay

KEY = "recipes"
Hook = Callable[[dict[str, Any]], None]


def save_recipes(pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put the recipe of every submodule that was changed into `checkpoint["recipes"]`, as `{full name: JSON}`."""
    found = {path: recipe_of(module) for path, module in pl_module.named_modules()}
    checkpoint[KEY] = {path: recipe.to_json() for path, recipe in found.items() if len(recipe)}


def restore_recipes(pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Change the live model as far as it lacks what the checkpoint's was changed by; averaged copies alike.

    Call it before the weights are loaded. A checkpoint that says nothing of recipes changes nothing.

    Raises:
        ConfigError: The live model was changed in another way, or the recipe does not fit it; nothing has been changed.
        UntrustedInputError: The recipe is not one.
    """
    if KEY not in checkpoint:
        return
    wanted = _read(checkpoint[KEY])
    for root in (pl_module, *_averages(pl_module)):
        paths = {path for path, module in root.named_modules() if len(recipe_of(module))} | set(wanted)
        missing = {path: _missing(_submodule(root, path), path, wanted.get(path, Recipe())) for path in paths}
        for path in sorted(paths, key=len):  # what is outside comes first
            _go_on(_submodule(root, path), path, missing[path])


def install(pl_module: pl.LightningModule) -> None:
    """Make any LightningModule keep recipes in its checkpoints; its own hooks still run. Doing it twice does nothing.

    Call it in a callback's `setup`, before Lightning restores.
    """
    hooks: dict[str, Any] = vars(pl_module)
    if isinstance(hooks.get("on_load_checkpoint"), partial) and hooks["on_load_checkpoint"].func is _load_with:
        return
    # Partial functions, not closures: they are copied and pickled with the module.
    hooks["on_save_checkpoint"] = partial(_save_with, pl_module, pl_module.on_save_checkpoint)
    hooks["on_load_checkpoint"] = partial(_load_with, pl_module, pl_module.on_load_checkpoint)


def _save_with(pl_module: nn.Module, own: Hook, checkpoint: dict[str, Any]) -> None:
    save_recipes(pl_module, checkpoint)
    own(checkpoint)


def _load_with(pl_module: nn.Module, own: Hook, checkpoint: dict[str, Any]) -> None:
    restore_recipes(pl_module, checkpoint)
    own(checkpoint)


def _read(recipes: Any) -> dict[str, Recipe]:
    if not isinstance(recipes, dict) or not all(isinstance(text, str) for text in recipes.values()):
        raise UntrustedInputError(f"checkpoint: {KEY!r} must be texts by module name; got {str(recipes)[:80]}")
    return {path: Recipe.from_json(text) for path, text in recipes.items()}


def _submodule(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(
            f"checkpoint: it changes the structure of {path!r}, which {type(root).__name__} does not have; build the "
            "model that the checkpoint was written by"
        ) from error


def _missing(module: nn.Module, path: str, wanted: Recipe) -> Recipe:
    """Return the edits that the live module still lacks."""
    live = recipe_of(module)
    if wanted.edits[: len(live)] == live.edits:
        return Recipe(wanted.edits[len(live) :])
    if live.edits[: len(wanted)] == wanted.edits:
        how = f"goes on after the checkpoint's {len(wanted)} with {_words(Recipe(live.edits[len(wanted) :]))}"
    else:
        first = next(n for n, pair in enumerate(zip(live, wanted, strict=False)) if pair[0] != pair[1])
        how = f"differs from the checkpoint's ({_words(wanted)}) at edit {first}"
    raise ConfigError(
        f"checkpoint: the structure of {path or 'the model'!r} was changed in another way: its recipe ({_words(live)}) "
        f"{how}; build the model anew before loading"
    )


def _go_on(module: nn.Module, path: str, missing: Recipe) -> None:
    try:
        replay(module, missing)
    except ValueError as error:
        raise ConfigError(f"checkpoint: its recipe for {path or 'the model'!r} does not fit: {error}") from error


def _words(recipe: Recipe) -> str:
    return ", ".join(edit.op for edit in recipe) or "no edits"


def _averages(pl_module: nn.Module) -> Iterator[nn.Module]:
    """Yield the copies of the module in which callbacks, such as `WeightAveraging`, average its weights by now."""
    trainer = getattr(pl_module, "_trainer", None)
    for callback in getattr(trainer, "callbacks", ()):
        for value in vars(callback).values():
            copy = value.module if isinstance(value, AveragedModel) else value
            if type(copy) is type(pl_module) and copy is not pl_module:
                yield copy
