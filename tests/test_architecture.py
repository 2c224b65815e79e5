"""The house's rules: imports run one way, nobody hides code in configs, nothing unsafe loads a file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_opt"
PURE = {"losses", "pruning", "quantization", "surgery", "evaluation", "diagnosis", "export", "reporting"}
LIGHTNING = {"tasks", "modules", "callbacks", "strategies", "checkpointing", "data", "models"}
HYDRA = {"config", "cli"}
# `testing` holds checkers for every room, so it may import from all but the command line.
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path):
    """Yield the modules that a file imports, wherever in it, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports here are absolute"
            yield node.module, node.lineno


def forbidden(path, name):
    here, top = room(path), name.split(".")[0]
    there = name.split(".")[1] if name.startswith("lightning_opt.") and "." in name else ""
    if top in ("hydra", "omegaconf"):
        return here not in HYDRA
    if here in PURE:
        allowed_lightning = path.name == "trusted_lightning.py"
        return (top in ("lightning", "pytorch_lightning") and not allowed_lightning) or there in LIGHTNING | HYDRA
    if here in LIGHTNING:
        return there in HYDRA
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    wrong = [f"line {line}: {name}" for name, line in imports(path) if forbidden(path, name)]
    assert not wrong, f"{path.relative_to(ROOT)} reaches into a room above it: {wrong}"


def test_the_rule_can_fail():
    assert forbidden(PACKAGE / "losses" / "x.py", "lightning.pytorch")
    assert forbidden(PACKAGE / "modules" / "x.py", "omegaconf")
    assert forbidden(PACKAGE / "evaluation" / "x.py", "lightning_opt.modules.teacher")
    assert not forbidden(PACKAGE / "cli" / "x.py", "hydra")


def test_only_one_file_instantiates():
    callers = [path for path in FILES if any(name == "hydra.utils" for name, _ in imports(path))]
    assert [path.relative_to(PACKAGE).as_posix() for path in callers] == ["config/build.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unsafe_is_called(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load"), f"line {node.lineno}"
        if called == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            assert safe, f"line {node.lineno}: torch.load without an explicit weights_only=True"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_every_room_ships_in_the_wheel():
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {f"lightning_opt.{path.parent.relative_to(PACKAGE).as_posix().replace('/', '.')}" for path in FILES}
    rooms = {name.removesuffix("..").removesuffix(".") for name in rooms}
    beside = {"lightning_opt.conf", "hydra_plugins.lightning_opt_sweeper"}
    assert rooms | beside == set(setup["packages"])


@pytest.mark.parametrize("name", ["lightning_opt", "lightning_opt.config.checks", "lightning_opt.cli.train"])
def test_what_answers_fast_imports_nothing_heavy(name):
    code = f"import sys, {name}; print([m for m in ('torch', 'lightning', 'numpy', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
