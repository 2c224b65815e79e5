"""What a `_target_` accepts, read from its source text.

Importing torch and Lightning takes seconds; refusing a misspelt key should not. So the arguments of a class are read
from the syntax tree of the file that defines it, following re-exports and base classes, and nothing is imported.
"""

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

_MAX_HOPS = 12


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The arguments of a callable.

    Attributes:
        annotations: Argument name -> annotation, or None where there is none.
        required: Arguments without a default.
        open: Whether it takes any keyword (`**kwargs`).
    """

    annotations: dict[str, ast.expr | None] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    open: bool = False


def signature_of(target: str) -> Signature | None:
    """Return what `target`, a dotted name, accepts; None when its source does not tell.

    Raises:
        LookupError: The module of that name, or the name inside one of this package's modules, does not exist. The
            message says which part.
    """
    found = _locate(target)
    if found is None:
        return None
    return _signature(*found)


def public_names(module: str) -> list[str]:
    """Return the names that a module's source defines or imports, to suggest one for a misspelt name."""
    path = _module_file(module)
    return sorted(_definitions(path)) if path else []


def _locate(target: str) -> tuple[Path, str] | None:
    """Find the file and the name in it that define `target`."""
    module, _, name = target.rpartition(".")
    if not module:
        raise LookupError(f"'{target}' is not a dotted name")
    path = _module_file(module)
    if path is None:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            raise LookupError(f"no module named '{module.split('.')[0]}'")
        return None
    for _ in range(_MAX_HOPS):
        definitions = _definitions(path)
        if name not in definitions:
            if module.startswith("lightning_opt."):
                raise LookupError(f"'{module}' has no '{name}'")
            return None
        node = definitions[name]
        if not isinstance(node, ast.ImportFrom):
            return path, name
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        module, name = _absolute(node, module, path), alias.name
        next_path = _module_file(module)
        if next_path is None:
            return None
        path = next_path
    return None


def _absolute(node: ast.ImportFrom, module: str, path: Path) -> str:
    """Return the full name of the module that a relative or absolute `from ... import` reads."""
    if not node.level:
        return node.module or ""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    parts = package.split(".")
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


@lru_cache(maxsize=256)
def _module_file(module: str) -> Path | None:
    """Find a module's file without importing any of its parents."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and not rest and spec.origin.endswith(".py") else None
    for root in spec.submodule_search_locations:
        place = Path(root).joinpath(*rest)
        for candidate in (place / "__init__.py", place.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


@lru_cache(maxsize=256)
def _definitions(path: Path) -> dict[str, ast.stmt]:
    """Return the classes, functions and imports of a file by name."""
    found: dict[str, ast.stmt] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: node for alias in node.names})
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return found


def _signature(path: Path, name: str, hops: int = 0) -> Signature | None:
    node = _definitions(path)[name]
    if isinstance(node, ast.FunctionDef):
        return _from_arguments(node.args, skip_first=False)
    if not isinstance(node, ast.ClassDef):
        return None
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _from_arguments(item.args, skip_first=True)
    if any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list):
        return _from_fields(path, node, hops)
    if not node.bases:
        return Signature()
    return _inherited(path, node.bases[0], hops)


def _inherited(path: Path, base: ast.expr, hops: int) -> Signature | None:
    """Follow a class without an `__init__` of its own to its first base."""
    found = _class_of(path, base) if hops <= _MAX_HOPS else None
    return _signature(found[0], found[1].name, hops + 1) if found else None


def _from_arguments(args: ast.arguments, *, skip_first: bool) -> Signature:
    positional = [*args.posonlyargs, *args.args][1 if skip_first else 0 :]
    without_default = {arg.arg for arg in positional[: len(positional) - len(args.defaults)]}
    without_default |= {
        arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None
    }
    annotations = {arg.arg: arg.annotation for arg in [*positional, *args.kwonlyargs]}
    return Signature(annotations=annotations, required=frozenset(without_default), open=args.kwarg is not None)


def _from_fields(path: Path, node: ast.ClassDef, hops: int = 0) -> Signature:
    """Read a dataclass's fields, those of the dataclasses it inherits from included."""
    annotations: dict[str, ast.expr | None] = {}
    required: set[str] = set()
    for base in reversed(node.bases):
        found = _class_of(path, base) if hops <= _MAX_HOPS else None
        if found is not None:
            inherited = _from_fields(*found, hops + 1)
            annotations |= inherited.annotations
            required |= inherited.required
    if any("dataclass" in ast.dump(decorator) for decorator in node.decorator_list):
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if "ClassVar" in ast.unparse(item.annotation):
                continue
            annotations[item.target.id] = item.annotation
            required = (required | {item.target.id}) if item.value is None else (required - {item.target.id})
    return Signature(annotations=annotations, required=frozenset(required))


def _class_of(path: Path, base: ast.expr) -> tuple[Path, ast.ClassDef] | None:
    """Find the class that a base names, here or where it is imported from."""
    if not isinstance(base, ast.Name):
        return None
    definition = _definitions(path).get(base.id)
    if isinstance(definition, ast.ImportFrom) and not definition.level:
        found = _locate(f"{definition.module}.{base.id}")
        if found is None:
            return None
        path, definition = found[0], _definitions(found[0])[found[1]]
    return (path, definition) if isinstance(definition, ast.ClassDef) else None
