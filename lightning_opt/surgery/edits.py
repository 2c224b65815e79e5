"""What an edit to a model's structure is: plain values that can be written down, and a way to apply them.

A new kind of edit is a frozen dataclass that inherits from `Edit`, names its `op`, and is imported by its room's
`__init__`. There is no table to fill in: an edit that is read from a file is looked up among the subclasses of `Edit`.
"""

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Self, TypeAlias

from torch import Tensor, nn

Dims: TypeAlias = Mapping[int, Sequence[int]]

# Rooms whose import brings edits of their own; entered only when an op is not known yet.
_ROOMS_WITH_EDITS = ("lightning_opt.pruning", "lightning_opt.quantization")


class Edit(ABC):
    """One change to a model's structure.

    Subclasses are frozen dataclasses whose fields are plain JSON values, checked in `__post_init__` (`ValueError` or
    `TypeError` with the field and the value).

    Attributes:
        op: The edit's name in a recipe.
        version: Raised when the meaning of the fields changes.
    """

    op: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def apply(self, model: nn.Module) -> nn.Module:
        """Change `model` in place and return it (or what replaces it).

        Raises:
            ValueError: The edit does not fit the model.
        """

    def cuts(self, model: nn.Module) -> dict[Tensor, Dims]:
        """Return which dims of which tensors of `model` the edit cuts, and to which indices; change nothing.

        Raises:
            ValueError: The edit does not fit the model.
        """
        return {}

    def under(self, path: str) -> "Edit":
        """Return the same edit for a model that holds this one as its submodule `path`.

        Raises:
            ValueError: This kind of edit is of whole models only.
        """
        raise ValueError(f"op {self.op!r} cannot be moved into a larger model")

    def to_dict(self) -> dict[str, Any]:
        """Return the edit as plain values: op, version and fields."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"op": self.op, "version": self.version, **_plain(fields)}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Make the edit from its fields.

        Raises:
            ValueError: A field is missing, unknown or wrong.
        """
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"field {unknown[0]!r} is not known; {cls.op} has {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error


def edit_from_dict(values: Any) -> Edit:
    """Make an edit from `{"op": ..., "version": 1, ...}`; a missing version means 1.

    Raises:
        ValueError: The op, the version or a field is not known or wrong.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("op"), str):
        raise ValueError(f"an edit is an object with an 'op'; got {str(values)[:80]}")
    kind = _kind_of(values["op"])
    version = values.get("version", kind.version)
    if type(version) is not int or version != kind.version:
        raise ValueError(f"op {kind.op!r} has version {kind.version} here; got {version!r}")
    return kind.from_values({name: value for name, value in values.items() if name not in ("op", "version")})


def _kind_of(op: str) -> type[Edit]:
    for room in ("", *_ROOMS_WITH_EDITS):
        if room and find_spec(room) is not None:
            importlib.import_module(room)
        found = [kind for kind in _subclasses(Edit) if getattr(kind, "op", None) == op]  # type: ignore[type-abstract]
        if len(found) > 1:
            raise ValueError(f"op {op!r} is claimed by {' and '.join(sorted(kind.__qualname__ for kind in found))}")
        if found:
            return found[0]
    known = sorted({kind.op for kind in _subclasses(Edit) if hasattr(kind, "op")})  # type: ignore[type-abstract]
    raise ValueError(f"op {op[:80]!r} is not known; known are {', '.join(known)}")


def _subclasses(kind: type[Edit]) -> Iterator[type[Edit]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _plain(value: Any) -> Any:
    """Turn tuples into lists and mappings into dicts, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
