"""The support table: methods by strategies, from what tests claim and what became of them."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = {
    "supervised": "no compression (the control)",
    "distil_logit": "distillation from logits",
    "distil_feature": "distillation from hidden states, hints",
    "distil_relation": "distillation from relations, contrastive",
    "distil_sequence": "distillation of sequences, on-policy",
    "unstructured": "pruning of weights",
    "n_m": "pruning of weights, N:M and blocks",
    "structured": "pruning of structures, shrink",
    "qat": "quantization while training",
    "ptq": "quantization after training",
}
STRATEGIES = {
    "one": "one process",
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "tensor_parallel": "tensor_parallel",
    "fsdp2_tp": "fsdp2_tp",
    "pipeline": "pipeline",
    "pipeline_ddp": "pipeline_ddp",
}
FEATURES = {
    "trains": "trains to the end",
    "loss": "the loss curve of one process",
    "masks": "the masks of one process",
    "structure": "the structure of one process, the same on all ranks",
    "quantizers": "the same quantizers on all ranks",
    "resume": "a run that is stopped and resumed ends bit-equal",
    "elsewhere": "resumes on another number of processes or under another strategy",
    "pair": "the pair of method and strategy",
}


@dataclass(frozen=True, order=True)
class Claim:
    """What a test shows.

    Attributes:
        method: A key of `METHODS`.
        strategy: A key of `STRATEGIES`.
        feature: A key of `FEATURES`.
        refused: Whether it shows that this is refused by name, before anything starts.
    """

    method: str
    strategy: str
    feature: str
    refused: bool = False


Claims = dict[Claim, dict[str, str]]  # test -> outcome


def claims_of(
    *, method: str | Sequence[str], strategy: str | Sequence[str], feature: str | Sequence[str], refused: bool = False
) -> Iterator[Claim]:
    """Yield every combination that a mark names.

    Raises:
        ValueError: A name that is in no row, column or list of features.
    """
    for value, known in ((method, METHODS), (strategy, STRATEGIES), (feature, FEATURES)):
        unknown = [name for name in _several(value) if name not in known]
        if unknown:
            raise ValueError(f"support mark: {unknown[0]!r} is none of {', '.join(known)}")
    for one in _several(method):
        for place in _several(strategy):
            yield from (Claim(one, place, what, refused) for what in _several(feature))


def _several(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def claims_in(folder: Path) -> Claims:
    """Read the marks out of the source of all tests, as if each of them had passed."""
    found: Claims = defaultdict(dict)
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.support" in text:
            for name, claim in _marked(ast.parse(text)):
                found[claim][f"{path.relative_to(folder.parent).as_posix()}::{name}"] = "passed"
    return found


def _marked(tree: ast.Module) -> Iterator[tuple[str, Claim]]:
    """Yield test functions with what their decorators claim, through lists of cases with a name too."""
    named = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or not function.name.startswith("test_"):
            continue
        for decorator in function.decorator_list:
            for call in (node for node in _with_named(decorator, named) if _is_mark(node)):
                options: dict[str, Any] = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
                yield from ((function.name, claim) for claim in claims_of(**options))


def _with_named(node: ast.AST, named: Mapping[str, ast.expr]) -> Iterator[Any]:
    """Walk through an expression and through what its names stand for."""
    for part in ast.walk(node):
        yield part
        if isinstance(part, ast.Name) and part.id in named:
            yield from _with_named(named[part.id], {name: value for name, value in named.items() if name != part.id})


def _is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.support")


def claims_from(rows: Iterable[Mapping[str, Any]]) -> Claims:
    """Read what the plugin wrote; of a test that ran with several values the worst outcome counts."""
    found: Claims = defaultdict(dict)
    for row in rows:
        claim = Claim(row["method"], row["strategy"], row["feature"], row["refused"])
        before = found[claim].get(row["test"], "passed")
        found[claim][row["test"]] = before if before != "passed" else row["outcome"]
    return found


def cell(claims: Claims, method: str, strategy: str) -> str:
    """Return what is known about one pair."""
    here = {claim: tests for claim, tests in claims.items() if (claim.method, claim.strategy) == (method, strategy)}
    if not here:
        return "not tested"
    outcomes = {outcome for tests in here.values() for outcome in tests.values()}
    if "failed" in outcomes:
        return "**failing**"
    shown = [claim for claim, tests in here.items() if "passed" in tests.values()]
    tested = [name for name in FEATURES if any(claim.feature == name and not claim.refused for claim in shown)]
    refused = any(claim.refused for claim in shown)
    words = [f"tested: {', '.join(tested)}"] if tested else []
    words += [("part refused" if tested else "refused by name")] if refused else []
    return "; ".join(words) or "not tested"


def document(claims: Claims) -> str:
    """Return `docs/support.md`."""
    lines = [
        "# What goes with what",
        "",
        "Made of what the tests claim and what became of them; two processes, four for `fsdp2_tp` and `pipeline_ddp`,",
        "all on CPU with gloo. Not written by hand:",
        "",
        "    python -m pytest -m support --support outcomes.json && python scripts/support_table.py outcomes.json",
        "",
        f"| | {' | '.join(STRATEGIES.values())} |",
        "|---" * (len(STRATEGIES) + 1) + "|",
    ]
    for method, title in METHODS.items():
        lines.append(f"| {title} | " + " | ".join(cell(claims, method, strategy) for strategy in STRATEGIES) + " |")
    used = [name for name in FEATURES if any(claim.feature == name and not claim.refused for claim in claims)]
    lines += ["", *(f"- **{name}**: {FEATURES[name]}" for name in used), "", "## The tests", ""]
    by_test: dict[str, set[str]] = defaultdict(set)
    for claim, tests in claims.items():
        for test in tests:
            what = "refused" if claim.refused else claim.feature
            by_test[test].add(f"{claim.method} x {claim.strategy}: {what}")
    lines += [f"- `{_short(test)}`: {'; '.join(sorted(said))}" for test, said in sorted(by_test.items())]
    return "\n".join(lines) + "\n"


def _short(test: str) -> str:
    return re.sub(r"^tests/", "", test)
