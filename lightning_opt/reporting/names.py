"""Name the models of a record as people speak of them."""

from collections.abc import Mapping
from typing import Any

from lightning_opt.reporting import text

Record = Mapping[str, Any]
_ADJECTIVES = {"distil": "distilled", "prun": "pruned", "shrink": "pruned", "quant": "quantized"}


def adjectives(record: Record) -> list[str]:
    """List what was done to the student, in the order of the stages: "distilled", "pruned", "quantized"."""
    methods = [str(stage["method"]).lower() for stage in record["stages"]]
    found = [word for method in methods for stem, word in _ADJECTIVES.items() if stem in method]
    if not found and "teacher" in record["models"]:
        found = ["distilled"]
    if record.get("pruning"):
        found.append("pruned")
    return list(dict.fromkeys(found))


def model_name(record: Record, name: str) -> str:
    """Name a model of the record for people: "teacher", "student alone", "distilled student"; others as they are.

    Where the run pruned, the control is "dense" and the student "pruned", or "dense alone" and "distilled + pruned"
    beside a teacher.
    """
    if record.get("pruning"):
        return _beside_pruning(record, name)
    if name == "baseline":
        return "student alone"
    if name == "student":
        words = adjectives(record)
        listed = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
        return f"{listed} {'student' if set(record['models']) & {'teacher', 'baseline'} else 'model'}".strip()
    return text.plain(name, limit=40)


def _beside_pruning(record: Record, name: str) -> str:
    names = {
        "baseline": "dense alone" if "teacher" in record["models"] else "dense",
        "dense": "dense, untrained",
        "student": " + ".join(adjectives(record)),
    }
    return names.get(name) or text.plain(name, limit=40)
