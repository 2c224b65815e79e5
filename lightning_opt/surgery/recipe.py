"""The recipe: how a changed model survives.

A model's shape may differ from what its constructor builds. The recipe is the ordered list of edits that led there, as
plain JSON, and `replay` (in `model_recipe`) gives a fresh model the same structure before weights are loaded.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_opt.errors import UntrustedInputError
from lightning_opt.surgery.edits import Edit, edit_from_dict

MAX_RECIPE_CHARACTERS = 64 * 1024 * 1024
MAX_EDITS = 10_000
_MAX_DEPTH = 16


@dataclass(frozen=True, init=False)
class Recipe:
    """An immutable, ordered list of edits.

    Example:
        >>> recipe = Recipe().append({"op": "drop_layers", "path": "encoder.layer", "kept": [0, 2]})
        >>> recipe.to_json()
        '[{"kept":[0,2],"op":"drop_layers","path":"encoder.layer","version":1}]'
        >>> Recipe.from_json(recipe.to_json()) == recipe
        True
    """

    edits: tuple[Edit, ...]

    def __init__(self, edits: Iterable[Edit | Mapping[str, Any]] = ()) -> None:
        object.__setattr__(self, "edits", tuple(_as_edit(edit) for edit in edits))

    def append(self, edit: Edit | Mapping[str, Any]) -> "Recipe":
        """Return a recipe with one more edit at its end.

        Raises:
            ValueError: The edit is not known or its fields are wrong.
        """
        return Recipe([*self.edits, edit])

    def to_list(self) -> list[dict[str, Any]]:
        """Return the edits as plain dicts."""
        return [edit.to_dict() for edit in self.edits]

    def to_json(self) -> str:
        """Return the recipe as JSON; equal recipes give equal text."""
        return json.dumps(self.to_list(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "Recipe":
        """Read a recipe, from wherever it comes: only edits that this package knows, only plain values.

        Raises:
            UntrustedInputError: The text is too long, is not a JSON list, or an edit is not known or not plain.
        """
        if len(text) > MAX_RECIPE_CHARACTERS:
            raise UntrustedInputError(
                f"the recipe has {len(text)} characters; at most {MAX_RECIPE_CHARACTERS} are read"
            )
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UntrustedInputError(f"the recipe is not JSON ({str(error)[:120]}); write it with to_json") from error
        if not isinstance(values, list) or len(values) > MAX_EDITS:
            raise UntrustedInputError(f"a recipe is a JSON list of at most {MAX_EDITS} edits; got {str(values)[:80]}")
        return Recipe(_read_edit(place, value) for place, value in enumerate(values))

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __hash__(self) -> int:
        return hash(self.to_json())


def _as_edit(edit: Edit | Mapping[str, Any]) -> Edit:
    return edit if isinstance(edit, Edit) else edit_from_dict(edit)


def _read_edit(place: int, value: Any) -> Edit:
    try:
        _check_plain(value, depth=0)
        return edit_from_dict(value)
    except ValueError as error:
        raise UntrustedInputError(f"edit {place} of the recipe cannot be used: {error}") from error


def _check_plain(value: Any, *, depth: int) -> None:
    """Refuse what `json.loads` gives beyond plain JSON: NaN and infinities, and endless nesting."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"values are nested deeper than {_MAX_DEPTH}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a plain number")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(item, depth=depth + 1)
