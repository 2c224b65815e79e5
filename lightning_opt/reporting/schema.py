"""Check plain JSON data against a JSON schema, for the keywords that our own schema files use.

The `jsonschema` package would do the same, but a run must not need a test package to write down what it measured. The
tests compare both verdicts. A keyword that is not implemented here is refused, so that a schema cannot outgrow it.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

Schema = dict[str, Any]


class Problem(NamedTuple):
    """One place where data and schema disagree.

    Attributes:
        path: Where in the data, such as `models.student.flops`; empty for the whole.
        message: What is wrong there.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


@cache
def record_schema() -> Schema:
    """Read the published schema of record.json (JSON Schema, draft 2020-12)."""
    text = files("lightning_opt.reporting").joinpath("record.schema.json").read_text(encoding="utf-8")
    schema: Schema = json.loads(text)
    return schema


def problems(data: Any, schema: Schema) -> Iterator[Problem]:
    """Yield every place where plain JSON data breaks a schema; nothing when it is valid.

    Args:
        data: What `json.loads` gives.
        schema: A schema that uses only the keywords of `_KEYWORDS`, with references into its own `$defs`.

    Raises:
        NotImplementedError: The schema uses a keyword that is not implemented here.
    """
    yield from _check(data, schema, root=schema, path="")


def _check(data: Any, schema: Schema, *, root: Schema, path: str) -> Iterator[Problem]:
    for keyword, value in schema.items():
        if keyword in _SILENT:
            continue
        if keyword not in _KEYWORDS:
            raise NotImplementedError(f"JSON-schema keyword {keyword!r} at {path or 'the top'}")
        yield from _KEYWORDS[keyword](data, value, schema, root, path)


def _valid(data: Any, schema: Schema, root: Schema) -> bool:
    return next(_check(data, schema, root=root, path=""), None) is None


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_number(data: Any) -> bool:
    return isinstance(data, int | float) and not isinstance(data, bool)


def _is_integer(data: Any) -> bool:
    return _is_number(data) and (isinstance(data, int) or data.is_integer())


_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda data: data is None,
    "boolean": lambda data: isinstance(data, bool),
    "integer": _is_integer,
    "number": _is_number,
    "string": lambda data: isinstance(data, str),
    "array": lambda data: isinstance(data, list),
    "object": lambda data: isinstance(data, dict),
}


def _equal(left: Any, right: Any) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _short(data: Any) -> str:
    text = json.dumps(data, ensure_ascii=True, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Each of these takes (data, keyword's value, the schema around it, root schema, path).


def _type(data: Any, value: Any, _schema: Schema, _root: Schema, path: str) -> Iterator[Problem]:
    names = [value] if isinstance(value, str) else value
    if not any(_TYPES[name](data) for name in names):
        yield Problem(path, f"{_short(data)} is not of type {' or '.join(names)}")


def _const(data: Any, value: Any, _schema: Schema, _root: Schema, path: str) -> Iterator[Problem]:
    if not _equal(data, value):
        yield Problem(path, f"{_short(data)} is not {_short(value)}")


def _enum(data: Any, value: Any, _schema: Schema, _root: Schema, path: str) -> Iterator[Problem]:
    if not any(_equal(data, allowed) for allowed in value):
        yield Problem(path, f"{_short(data)} is none of {', '.join(map(str, value))}")


def _ref(data: Any, value: Any, _schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    yield from _check(data, root["$defs"][value.removeprefix("#/$defs/")], root=root, path=path)


def _required(data: Any, value: Any, _schema: Schema, _root: Schema, path: str) -> Iterator[Problem]:
    if isinstance(data, dict):
        yield from (Problem(path, f"{name!r} is missing") for name in value if name not in data)


def _properties(data: Any, value: Any, _schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    if isinstance(data, dict):
        for name in value.keys() & data.keys():
            yield from _check(data[name], value[name], root=root, path=_join(path, name))


def _additional(data: Any, value: Any, schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    if isinstance(data, dict):
        for name in data.keys() - schema.get("properties", {}).keys():
            yield from _check(data[name], value, root=root, path=_join(path, name))


def _items(data: Any, value: Any, _schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    if isinstance(data, list):
        for position, item in enumerate(data):
            yield from _check(item, value, root=root, path=_join(path, position))


def _contains(data: Any, value: Any, _schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    if isinstance(data, list) and not any(_valid(item, value, root) for item in data):
        yield Problem(path, "no item is of the form that is asked for")


def _at_least(kind: type[list[Any]] | type[str] | type[dict[str, Any]], what: str) -> Callable[..., Iterator[Problem]]:
    def check(data: Any, value: int, _schema: Schema, _root: Schema, path: str) -> Iterator[Problem]:
        if isinstance(data, kind) and len(data) < value:
            yield Problem(path, f"fewer than {value} {what}")

    return check


def _bound(holds: Callable[[Any, Any], bool], words: str) -> Callable[..., Iterator[Problem]]:
    def check(data: Any, value: float, _schema: Schema, _root: Schema, path: str) -> Iterator[Problem]:
        if _is_number(data) and not holds(data, value):
            yield Problem(path, f"{_short(data)} is not {words} {value}")

    return check


def _pattern(data: Any, value: str, _schema: Schema, _root: Schema, path: str) -> Iterator[Problem]:
    if isinstance(data, str) and re.search(value, data) is None:
        yield Problem(path, f"{_short(data)} does not match {value}")


def _all_of(data: Any, value: Any, _schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    for part in value:
        yield from _check(data, part, root=root, path=path)


def _any_of(data: Any, value: Any, _schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    if not any(_valid(data, part, root) for part in value):
        yield Problem(path, f"{_short(data)} has none of the allowed forms")


def _not(data: Any, value: Any, _schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    if _valid(data, value, root):
        yield Problem(path, f"{_short(data)} has a form that is not allowed")


def _if(data: Any, value: Any, schema: Schema, root: Schema, path: str) -> Iterator[Problem]:
    branch = schema.get("then" if _valid(data, value, root) else "else")
    if branch is not None:
        yield from _check(data, branch, root=root, path=path)


_SILENT = frozenset({"$schema", "$id", "$defs", "title", "description", "then", "else"})  # then/else: read by `if`
_KEYWORDS: dict[str, Callable[..., Iterator[Problem]]] = {
    "type": _type,
    "const": _const,
    "enum": _enum,
    "$ref": _ref,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "contains": _contains,
    "minItems": _at_least(list, "items"),
    "minLength": _at_least(str, "characters"),
    "minProperties": _at_least(dict, "entries"),
    "minimum": _bound(lambda data, bound: data >= bound, "at least"),
    "maximum": _bound(lambda data, bound: data <= bound, "at most"),
    "exclusiveMinimum": _bound(lambda data, bound: data > bound, "above"),
    "pattern": _pattern,
    "allOf": _all_of,
    "anyOf": _any_of,
    "not": _not,
    "if": _if,
}
