"""Name the models of a record as people speak of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_opt.reporting import text

Record = Mapping[str, Any]
_ADJECTIVES = {"distil": "distilled", "prun": "pruned", "shrink": "pruned", "quant": "quantized"}


def adjectives(record: Record) -> list[str]:
    """List what was done to the student, in the order of the stages: "distilled", "pruned", "quantized"."""
    methods = [str(stage["method"]).lower() for stage in record["stages"]]
    found = [word for method in methods for stem, word in _ADJECTIVES.items() if stem in method]
    if not found and "teacher" in record["models"]:
        found = ["distilled"]
    found += [word for part, word in (("pruning", "pruned"), ("quantization", "quantized")) if record.get(part)]
    return list(dict.fromkeys(found))


def model_name(record: Record, name: str) -> str:
    """Name a model of the record for people: "teacher", "student alone", "distilled student"; others as they are.

    Where the run pruned, the control is "dense" and the student "pruned", or "dense alone" and "distilled + pruned"
    beside a teacher. Where it quantized, the control is "float" and the student "quantized"; where it did both, the
    control is "dense" and what was pruned but not yet quantized is "pruned, float".
    """
    if record.get("pruning") or record.get("quantization"):
        return _beside_itself(record, name)
    if name == "baseline":
        return "student alone"
    if name == "student":
        words = adjectives(record)
        listed = ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
        return f"{listed} {'student' if set(record['models']) & {'teacher', 'baseline'} else 'model'}".strip()
    return text.plain(name, limit=40)


def _beside_itself(record: Record, name: str) -> str:
    """Name the models of a run that changed one: what it was before, and what was done to it."""
    control = "dense" if record.get("pruning") else "float"
    before = [word for word in adjectives(record) if word != "quantized"]
    names = {
        "baseline": f"{control} alone" if "teacher" in record["models"] else control,
        "dense": "dense, untrained",
        "float": ", ".join([" + ".join(before), "float"] if before else ["float"]),
        "student": " + ".join(adjectives(record)),
    }
    trained_so = (record.get("quantization") or {}).get("method") == "qat"
    if name == "float" and not before and trained_so:
        return "float, same weights"
    return names.get(name) or text.plain(name, limit=40)


def control_name(record: Record, name: str) -> str:
    """Name a float model inside a sentence: "dense model", "float model"."""
    return f"{model_name(record, name).removesuffix(' alone')} model"


def before_name(record: Record) -> str:
    """Name the model that a run's student is set against in its ratios: "teacher", "dense", "float"."""
    models = record["models"]
    if "teacher" in models:
        return "teacher"
    if record.get("pruning"):
        return "dense"
    return "float" if record.get("quantization") else "student alone"


class GroupWords(NamedTuple):
    """What a table over several runs calls their models.

    Attributes:
        control: The same model alone, without what the runs did to it.
        result: What the runs made.
    """

    control: str
    result: str


def group_words(records: Sequence[Record]) -> GroupWords:
    """Name control and result of several runs: as one run does where all agree, else in words that fit all.

    >>> group_words([])
    GroupWords(control='student alone', result='student')
    """
    pruned, quantized = ([bool(record.get(part)) for record in records] for part in ("pruning", "quantization"))
    if not any(pruned) and not any(quantized):
        return GroupWords("student alone", "student")
    results = {" + ".join(adjectives(record)) for record in records}
    control = "dense" if any(pruned) else "float"
    return GroupWords(control, results.pop() if len(results) == 1 else "result")
