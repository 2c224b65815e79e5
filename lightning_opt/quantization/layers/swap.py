"""Give a module behaviours on top of its class, and take them away: its object, tensors and children stay.

The class of the module becomes a subclass, made once for each class and cached, whose objects can be copied and
pickled. Without its behaviours the module is of the class that it was.
"""

import copyreg
import functools
from typing import Any

from torch import nn


class _Made(type):
    """The type of classes that are made here: they have no name to be found by, and are pickled as what made them."""

    plain: type[nn.Module]
    behaviours: tuple[type, ...]


def add_behaviour(module: nn.Module, behaviour: type) -> None:
    """Put `behaviour` on top of the class of `module`; twice is once."""
    plain, behaviours = _parts(type(module))
    if behaviour not in behaviours:
        module.__class__ = _subclass(plain, (*behaviours, behaviour))


def remove_behaviour(module: nn.Module, behaviour: type) -> None:
    """Take `behaviour` off the class of `module`; one that is not there is no error."""
    plain, behaviours = _parts(type(module))
    rest = tuple(kind for kind in behaviours if kind is not behaviour)
    if rest != behaviours:
        module.__class__ = _subclass(plain, rest) if rest else plain


def replace_behaviour(module: nn.Module, behaviour: type, other: type) -> None:
    """Put `other` in the place of `behaviour`, beneath what lies on top of it."""
    plain, behaviours = _parts(type(module))
    module.__class__ = _subclass(plain, tuple(other if kind is behaviour else kind for kind in behaviours))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of `module` without behaviours."""
    plain: type[nn.Module] = _parts(type(module))[0]
    return plain


def _parts(kind: type) -> tuple[Any, tuple[type, ...]]:
    return (kind.plain, kind.behaviours) if isinstance(kind, _Made) else (kind, ())


@functools.cache
def _subclass(plain: Any, behaviours: tuple[type, ...]) -> type[nn.Module]:
    prefix = getattr(behaviours[-1], "prefix", "")
    values = {"plain": plain, "behaviours": behaviours, "__doc__": plain.__doc__, "__module__": __name__}
    kind: Any = type(plain)
    made: type[nn.Module] = _type_over(kind)(f"{prefix}{plain.__name__}", (*reversed(behaviours), plain), values)
    return made


@functools.cache
def _type_over(kind: Any) -> type:
    """Return the type of subclasses of classes whose own type is `kind`, such as `ABCMeta`."""
    found = _Made if kind is type else type(f"Made{kind.__name__}", (_Made, kind), {})
    copyreg.pickle(found, _reduced)
    return found


def _reduced(kind: Any) -> tuple[Any, ...]:
    return _subclass, (kind.plain, kind.behaviours)
