"""Whether a plain value fits a type annotation, as far as the annotation's text tells."""

import ast
from typing import Any

# What a YAML file cannot hold: a plain number or word given for one of these is a mistake.
_OBJECTS = {"Tensor", "Module", "Optimizer", "Task", "Schedule", "Callable", "DistillationLoss", "Teacher"}
_LISTS = {"list", "List", "tuple", "Tuple", "Sequence", "Iterable", "Collection", "set", "frozenset"}
_DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}


def fits(value: Any, annotation: ast.expr | None) -> bool:
    """Tell whether `value` may be given where `annotation` stands; unknown annotations accept everything."""
    if annotation is None or (isinstance(value, dict) and "_target_" in value):
        return True
    verdicts = [_fits_one(value, part) for part in _alternatives(annotation)]
    return any(verdict is not False for verdict in verdicts)


def describe(annotation: ast.expr) -> str:
    """Return an annotation as text, for an error message."""
    return ast.unparse(annotation)


def _alternatives(node: ast.expr) -> list[ast.expr]:
    """Split a union into its members."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _alternatives(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _alternatives(node.left) + _alternatives(node.right)
    if isinstance(node, ast.Subscript) and _name(node.value) == "Optional":
        return [*_alternatives(node.slice), ast.Constant(value=None)]
    if isinstance(node, ast.Subscript) and _name(node.value) == "Union":
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return [part for member in members for part in _alternatives(member)]
    return [node]


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _fits_one(value: Any, node: ast.expr) -> bool | None:
    """Return True or False where it is known, None where it is not."""
    if isinstance(node, ast.Constant) and node.value is None:
        return value is None
    if isinstance(node, ast.Subscript):
        return _fits_generic(value, node)
    name = _name(node)
    if name in _OBJECTS:
        return False
    return _fits_plain(value, name)


def _fits_plain(value: Any, name: str) -> bool | None:
    is_bool = isinstance(value, bool)
    checks: dict[str, bool] = {
        "int": isinstance(value, int) and not is_bool,
        "float": isinstance(value, int | float) and not is_bool,
        "bool": is_bool,
        "str": isinstance(value, str),
        "Path": isinstance(value, str),
        "Any": True,
        "object": True,
        **dict.fromkeys(_LISTS, isinstance(value, list)),
        **dict.fromkeys(_DICTS, isinstance(value, dict)),
    }
    return checks.get(name)


def _fits_generic(value: Any, node: ast.Subscript) -> bool | None:
    name = _name(node.value)
    if name == "Literal":
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return value in [member.value for member in members if isinstance(member, ast.Constant)]
    if name in _OBJECTS:
        return False
    if name in _LISTS and isinstance(value, list):
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        kinds = [m for m in members if not (isinstance(m, ast.Constant) and m.value is Ellipsis)]
        return all(any(fits(item, kind) for kind in kinds) for item in value)
    if name in _DICTS and isinstance(value, dict) and isinstance(node.slice, ast.Tuple):
        return all(fits(item, node.slice.elts[1]) for item in value.values())
    return _fits_plain(value, name)
