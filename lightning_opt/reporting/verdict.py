"""Say in one or two plain sentences what a run achieved, also when it achieved nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_opt.reporting import pruned, quantized_verdict, text
from lightning_opt.reporting.names import model_name

Record = Mapping[str, Any]
_STOPPED = {
    "running": "The run is still going on; what follows was measured so far.",
    "failed": "The run failed; what follows was measured before it stopped.",
    "interrupted": "The run was interrupted; what follows was measured before it stopped. "
    "The same command with the same run_dir resumes it.",
}


@dataclass(frozen=True)
class Verdict:
    """What a run achieved.

    Attributes:
        sentence: One sentence that a person understands.
        mood: "good" (it helped), "mixed", "bad" (it did not help, or failed) or "open" (nothing can be said).
        caveats: Short sentences that limit what was said.
    """

    sentence: str
    mood: str
    caveats: tuple[str, ...] = ()


def verdict(record: Record) -> Verdict:
    """Judge a run by its record: status first, then quality against teacher and student alone, then size and speed."""
    stopped = _STOPPED.get(record["status"])
    if stopped is not None:
        why = text.plain(record.get("error") or "")
        return Verdict(
            f"{stopped} Reason: {why}" if why else stopped, "open" if record["status"] == "running" else "bad"
        )
    comparison = record["comparison"]
    metric = comparison.get("metric")
    values = {name: (model["quality"] or {}).get(metric) for name, model in record["models"].items()}
    if values.get("student") is None:
        return Verdict("The run finished, but the student's quality was not measured.", "open")
    if record.get("quantization"):
        beside = [_kept(comparison, values)] if values.get("teacher") is not None else []
        judged = quantized_verdict.judge(record, beside=beside, fewer=_fewer(record) if record.get("pruning") else [])
        return Verdict(*judged)
    if record.get("pruning"):
        return _of_pruning(record, values)
    subject = f"The {model_name(record, 'student')}"
    kept = _kept(comparison, values)
    gained, mood = _gained(comparison, values)
    small = _smaller(comparison)
    clauses = [part for part in (kept, gained, small) if part]
    return Verdict(f"{subject} {_listed(clauses)}.", _mood(mood, comparison), tuple(_caveats(record, values)))


def _listed(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + " and " + clauses[-1]


def _kept(comparison: Mapping[str, Any], values: Mapping[str, float | None]) -> str:
    metric = text.plain(comparison["metric"], limit=30)
    student, teacher = values["student"], values.get("teacher")
    if teacher is None:
        return f"reaches {metric} {text.quality(student)}"
    pair = f"{text.quality(student)} of {text.quality(teacher)}"
    if comparison.get("quality_gap", 0.0) <= 0:
        return f"matches or exceeds its teacher's {metric} ({text.quality(student)}; teacher {text.quality(teacher)})"
    if comparison.get("quality_kept") is not None and text.is_share(metric):
        return f"keeps {100 * comparison['quality_kept']:.1f} % of the teacher's {metric} ({pair})"
    return f"reaches {metric} {text.quality(student)} (teacher {text.quality(teacher)})"


def _gained(comparison: Mapping[str, Any], values: Mapping[str, float | None]) -> tuple[str, str]:
    gain, baseline = comparison.get("baseline_gain"), values.get("baseline")
    if gain is None or baseline is None:
        return "", "open"
    pair = f"{text.quality(values['student'])} against {text.quality(baseline)}"
    if gain <= 0:
        return f"did not beat the student alone ({pair})", "bad"
    metric = comparison["metric"]
    what = text.difference(gain, metric) if text.is_share(metric) else f"{text.difference(gain, metric)} {metric}"
    return f"gains {text.plain(what)} over the student alone", "good"


def _smaller(comparison: Mapping[str, Any]) -> str:
    parts = []
    size = comparison.get("size_ratio") or comparison.get("params_ratio")
    if size:
        parts.append(_factor(size, "smaller", "larger", "as large as before"))
    latency = next((row for row in comparison.get("latency_ratio") or () if row["value"]), None)
    if latency:
        factor = _factor(latency["value"], "faster", "slower", "no faster")
        parts.append(f"{factor} at batch {latency['batch']}")
    return f"is {' and '.join(parts)}" if parts else ""


def _factor(ratio: float, more: str, less: str, same: str) -> str:
    if 0.98 < ratio < 1.02:
        return same
    return f"{text.times(ratio)} {more}" if ratio > 1 else f"{text.times(1 / ratio)} {less}"


def _mood(mood: str, comparison: Mapping[str, Any]) -> str:
    latency = [row["value"] for row in comparison.get("latency_ratio") or () if row["value"]]
    return "mixed" if mood == "good" and latency and max(latency) < 1.02 else mood


def _caveats(record: Record, values: Mapping[str, float | None]) -> list[str]:
    comparison = record["comparison"]
    said = []
    if values.get("teacher") is not None and values.get("baseline") is None:
        said.append(
            "There was no control run of the student alone, so this does not show that distillation helped "
            "(set baseline=true)."
        )
    gain = comparison.get("baseline_gain")
    if gain is not None and comparison.get("gap_closure") is not None:
        said.append(
            f"It closes {100 * comparison['gap_closure']:.0f} % of the gap between the student alone and the teacher."
        )
    if gain is not None:
        said.append(f"One seed ({record['seed']}): a difference this size can change with the seed.")
    rows = comparison.get("speedup") or ()
    for row in rows[:1]:
        best = row["over_best_dense_fp32"]
        if best is not None:
            said.append(_against_best(row, best))
    return said


def _against_best(row: Mapping[str, Any], ratio: float) -> str:
    engine = text.plain(row.get("best_dense_fp32_engine", "its best engine"))
    factor = _factor(ratio, "faster", "slower", "no faster")
    reference = {"baseline": "student alone"}.get(str(row.get("reference")), "teacher")
    return (
        f"In its fastest engine ({text.plain(row['engine'])}) it is {factor} than the {reference} in its best dense "
        f"fp32 engine ({engine}) at batch {row['batch']}."
    )


def _of_pruning(record: Record, values: Mapping[str, float | None]) -> Verdict:
    """Judge a run that pruned: quality against the dense model, then what it is worth in speed and in bytes."""
    subject = f"The {model_name(record, 'student')} model"
    kept, lost = _kept_of_dense(record, values)
    beside_teacher = [_kept(record["comparison"], values)] if values.get("teacher") is not None else []
    clauses = [kept, *beside_teacher, *_fewer(record), _faster(record), _lighter(record)]
    sentence = f"{subject} {_listed([clause for clause in clauses if clause])}."
    return Verdict(sentence, _mood_of_pruning(record, lost), tuple(_caveats_of_pruning(record, values)))


def _kept_of_dense(record: Record, values: Mapping[str, float | None]) -> tuple[str, float | None]:
    """Say what of the dense model's quality is left; also return the loss as a share of it, None if unknown."""
    metric, student, dense = record["comparison"]["metric"], values["student"], values.get("baseline")
    named = text.plain(metric, limit=30)
    if student is None or dense is None:
        return ("" if values.get("teacher") is not None else f"reaches {named} {text.quality(student)}"), None
    gain = record["comparison"].get("baseline_gain") or 0.0
    loss = -gain / abs(dense) if dense else 0.0
    if gain >= 0:
        pair = f"{text.quality(student)}; dense {text.quality(dense)}"
        return f"matches or exceeds the dense model's {named} ({pair})", loss
    pair = f"{text.quality(student)} of {text.quality(dense)}"
    if text.is_share(metric) and dense > 0:
        return f"keeps {100 * student / dense:.1f} % of the dense model's {named} ({pair})", loss
    return f"has {named} {text.quality(student)} (dense {text.quality(dense)})", loss


def _fewer(record: Record) -> list[str]:
    totals = record["pruning"]["totals"]
    before, params, nonzero = totals["params_before"], totals["params"], totals["nonzero"]
    if not before or not nonzero or not params:
        return []
    if before / nonzero < pruned.LEAST:
        return ["has as many parameters as before: nothing was pruned"]
    said = [f"{text.times(before / params)} fewer parameters"] if before / params >= pruned.LEAST else []
    if params / nonzero >= pruned.LEAST:
        said.append(f"{text.times(before / nonzero)} fewer that are not zero")
        said[-1] = said[-1] if len(said) > 1 else said[-1].replace("fewer that", "fewer parameters that")
    return [f"has {' and '.join(said)}"] if said else []


def _faster(record: Record) -> str:
    found = [pruned.fastest(record, batch) for batch in pruned.batches(record)[:1]]
    if not found or found[0] is None:
        return ""
    where = f"at batch {pruned.batches(record)[0]}, each in its fastest engine"
    ratio = found[0]["ratio"]
    if 1 / pruned.RESOLVED < ratio < pruned.RESOLVED:
        return f"is no faster {where} ({ratio:.2f}×)"
    return f"is {_factor(ratio, 'faster', 'slower', 'no faster')} {where}"


def _lighter(record: Record) -> str:
    found = pruned.smallest_form(record)
    if found is None:
        return ""
    form, size, before = found
    how = "" if form == "dense" else f" ({pruned.FORMS[form]})"
    return f"takes {text.size(size)} on disk instead of {text.size(before)}{how}"


def _mood_of_pruning(record: Record, loss: float | None) -> str:
    faster = pruned.is_faster(record)
    if not record["pruning"]["kinds"] or (loss is not None and loss > pruned.LARGE_LOSS):
        return "bad"
    if loss is None:
        return "open" if faster is None else "mixed"
    return "good" if faster and loss <= pruned.SMALL_LOSS else "mixed"


def _caveats_of_pruning(record: Record, values: Mapping[str, float | None]) -> list[str]:
    said = []
    if values.get("baseline") is None:
        said.append(
            "There was no dense control run at the same budget, so what pruning cost in quality is not known "
            "(set baseline=true)."
        )
    said += [text.plain(words, limit=600) for words in record["pruning"]["sentences"]]
    if values.get("baseline") is not None:
        said.append(f"One seed ({record['seed']}): a difference this size can change with the seed.")
    return said
