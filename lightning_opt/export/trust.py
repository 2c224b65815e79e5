"""Rebuild objects from a description that may come from elsewhere, by exact-name trust.

A description beside foreign weights is data, not code: `{"_target_": "lightning_opt.models.ConvNet", ...}` is built
only where that exact name is allowed, and only when what the name leads to really is a class or function of that
package. Prefixes and wildcards are not enough: whole libraries full of functions that run code live below them.
"""

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, get_type_hints

from torch import nn

from lightning_opt.errors import ConfigError, LightningOptError, UntrustedInputError

MAX_DEPTH = 32
"""Deepest nesting that is followed."""
MAX_VALUES = 100_000
"""Most values that one description may hold."""
MAX_TEXT = 1 << 20
"""Longest text that a description may hold, in characters."""
_MODELS = "lightning_opt.models"
_TARGET, _PARTIAL = "_target_", "_partial_"


def declared_models() -> frozenset[str]:
    """Return the exact names of all models that this package offers: its classes and functions that make a module."""
    # By name: this room is pure torch and lies below the one that holds the models.
    models = importlib.import_module(_MODELS)
    return frozenset(f"{_MODELS}.{name}" for name in models.__all__ if _makes_module(getattr(models, name)))


def build_trusted(spec: Mapping[str, Any], *, allowed: Collection[str]) -> object:
    """Build the object that a description names, and the objects that are nested in its values.

    The whole description is checked before anything is imported, and all names are resolved before anything is built.

    Args:
        spec: `{"_target_": exact name, argument: plain value or nested description, ...}`; `"_partial_": True` gives a
            callable that builds the object later.
        allowed: The exact names that may be built, such as "lightning_opt.models.ConvNet".

    Raises:
        UntrustedInputError: A name is not allowed or stands for something else, a key steers the building in another
            way, or a value is not plain.
        ConfigError: A name cannot be imported, or what it names refuses its arguments.
    """
    check_trusted(spec, allowed=allowed)
    if not isinstance(spec, Mapping) or _TARGET not in spec:
        raise UntrustedInputError(f"the description names no {_TARGET}; nothing is built from it")
    targets = {name: _resolve(name) for name in sorted(targets_of(spec))}
    return _build(spec, targets)


def check_trusted(spec: Any, *, allowed: Collection[str]) -> None:
    """Refuse what `build_trusted` would refuse, without importing or building anything.

    Raises:
        UntrustedInputError: As `build_trusted`, but for what a name leads to.
    """
    if isinstance(allowed, str):
        raise TypeError(f"allowed must be a collection of names, got the text {allowed!r}")
    names, queue, seen = frozenset(allowed), [(spec, 0)], 0
    while queue:
        value, depth = queue.pop()
        seen += 1
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise UntrustedInputError(
                f"the description is nested deeper than {MAX_DEPTH} or holds more than {MAX_VALUES} values; not built"
            )
        if isinstance(value, Mapping):
            _check_keys(value, names)
            queue += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list | tuple):
            queue += [(each, depth + 1) for each in value]
        else:
            _check_scalar(value)


def targets_of(spec: Any) -> frozenset[str]:
    """Return every name that a description would build."""
    found, queue = set(), [spec]
    while queue:
        value = queue.pop()
        if isinstance(value, Mapping):
            found |= {value[_TARGET]} if isinstance(value.get(_TARGET), str) else set()
            queue += value.values()
        elif isinstance(value, list | tuple):
            queue += value
    return frozenset(found)


def _check_keys(value: Mapping[Any, Any], allowed: frozenset[str]) -> None:
    target = value.get(_TARGET)
    if _TARGET in value and (type(target) is not str or target not in allowed):
        raise _refusal(target, "it is none of the declared names")
    for key in value:
        if type(key) is not str or len(key) > MAX_TEXT:
            raise UntrustedInputError(f"the description has the key {_shown(key)}, which is no plain text; not built")
        if key.startswith("_") and (key not in (_TARGET, _PARTIAL) or target is None):
            raise UntrustedInputError(
                f"the description of {_shown(target)} has the key {_shown(key)}, which is not allowed; not built"
            )
    if type(value.get(_PARTIAL, False)) is not bool:
        raise UntrustedInputError(f"the description of {_shown(target)}: {_PARTIAL} must be true or false; not built")


def _check_scalar(value: Any) -> None:
    plain = value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value))
    if not plain and not (type(value) is str and len(value) <= MAX_TEXT):
        raise UntrustedInputError(
            f"the description holds the {type(value).__name__} {_shown(value)}, which is no plain value; not built"
        )


def _build(value: Any, targets: Mapping[str, Callable[..., Any]]) -> Any:
    """Build a checked description from the inside out."""
    if isinstance(value, list | tuple):
        return [_build(each, targets) for each in value]
    if not isinstance(value, Mapping):
        return value
    arguments = {key: _build(each, targets) for key, each in value.items() if key not in (_TARGET, _PARTIAL)}
    if _TARGET not in value:
        return arguments
    name = value[_TARGET]
    if value.get(_PARTIAL, False):
        return functools.partial(targets[name], **arguments)
    try:
        return targets[name](**arguments)
    except LightningOptError:
        raise
    except Exception as error:  # a foreign description may be wrong in any way; it is never a bug of ours
        raise ConfigError(f"{name} cannot be built from its description: {error}") from error


def _resolve(name: str) -> Callable[..., Any]:
    """Import an allowed name and make sure that it is what it says: a class or function of the package it names."""
    found = _find(name)
    top, home = name.partition(".")[0], str(getattr(found, "__module__", None))
    real = f"{home}.{getattr(found, '__qualname__', '?')}"
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise _misnamed(name, f"it is a {type(found).__name__}, no class or function")
    if home.partition(".")[0] != top or top in sys.stdlib_module_names:
        raise _misnamed(name, f"it is really {real}")
    try:
        true_to_name = functools.reduce(getattr, found.__qualname__.split("."), sys.modules[home]) is found
    except (AttributeError, KeyError):
        true_to_name = False
    if not true_to_name:
        raise _misnamed(name, f"it poses as {real}")
    made: Callable[..., Any] = found
    return made


def _find(name: str) -> Any:
    """Follow a dotted name through modules and classes."""
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise _misnamed(name, "it is no dotted name of a package")
    found: Any = _import(parts[0], name)
    for depth, part in enumerate(parts[1:], start=2):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            found = _import(".".join(parts[:depth]), name)
        elif isinstance(found, ModuleType) or (inspect.isclass(found) and hasattr(found, part)):
            found = getattr(found, part)
        else:
            raise _misnamed(name, f"{'.'.join(parts[: depth - 1])} holds no {part}")
    return found


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{name} cannot be imported ({error}); install its package or correct the name") from error


def _makes_module(found: Any) -> bool:
    made = get_type_hints(found).get("return") if inspect.isfunction(found) else found
    return inspect.isclass(made) and issubclass(made, nn.Module)


def _refusal(target: object, why: str) -> UntrustedInputError:
    """Say in one sentence what is not built, and how an operator who wants it says so."""
    name = _shown(target)
    return UntrustedInputError(f"{_TARGET} {name} is not built: {why}; if you trust it, say trusted_targets=[{name}]")


def _misnamed(target: str, why: str) -> UntrustedInputError:
    """Say why even trust in a name does not reach what it leads to."""
    name = _shown(target)
    return UntrustedInputError(
        f"{_TARGET} {name} is not built: {why}, which trusted_targets=[{name}] does not cover; name a class or "
        "function by its own package"
    )


def _shown(value: object) -> str:
    """Shorten a value and escape what could forge a line of output."""
    return repr(str(value)[:120])[1:-1]
