"""Make a transformer shallower by keeping some of its layers."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_opt.errors import ConfigError
from lightning_opt.models.checks import positive


def chosen_layers(total: int, keep: int | Sequence[int]) -> list[int]:
    """Return the positions of the layers to keep, in order.

    Args:
        total: Number of layers there are.
        keep: How many, evenly spaced from the first to the last (one: the first); or the positions themselves.

    Raises:
        ValueError: There are not that many layers, or positions are repeated or out of range.

    Example:
        >>> chosen_layers(6, 3), chosen_layers(12, 6), chosen_layers(6, [0, 5])
        ([0, 2, 5], [0, 2, 4, 7, 9, 11], [0, 5])
    """
    if isinstance(keep, int):
        if positive("num_layers", keep) > total:
            raise ValueError(f"num_layers must be at most the model's {total}, got {keep}")
        return [round(i * (total - 1) / max(keep - 1, 1)) for i in range(keep)]
    chosen = list(keep)
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < total for i in chosen):
        raise ValueError(f"num_layers must list different positions from 0 to {total - 1}, got {chosen}")
    return chosen


def keep_layers(model: Any, keep: int | Sequence[int]) -> list[int]:
    """Drop layers of a Hugging Face model in place and correct its configuration; return the positions kept.

    Args:
        model: Has `config.num_hidden_layers` and one `nn.ModuleList` of that many layers.
        keep: As in `chosen_layers`.

    Raises:
        ConfigError: The layers cannot be found.
        ValueError: See `chosen_layers`.
    """
    total = model.config.num_hidden_layers
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise ConfigError(
            f"num_layers needs a model with one list of {total} layers, but {type(model).__name__} has {found}; "
            "leave num_layers out"
        )
    chosen = chosen_layers(total, keep)
    parent, _, name = lists[0].rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, nn.ModuleList(getattr(owner, name)[i] for i in chosen))
    if isinstance(getattr(model.config, "layer_types", None), list):
        model.config.layer_types = [model.config.layer_types[i] for i in chosen]
    model.config.num_hidden_layers = len(chosen)
    return chosen
