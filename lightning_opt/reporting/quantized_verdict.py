"""Judge a run that quantized: its quality against the float model, then what that is worth in bytes and in speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_opt.reporting import quantized, text
from lightning_opt.reporting.names import control_name, model_name
from lightning_opt.reporting.recommendation import RESOLVED

Record = Mapping[str, Any]
Judgement = tuple[str, str, tuple[str, ...]]


def judge(record: Record, *, beside: Sequence[str] = (), fewer: Sequence[str] = ()) -> Judgement:
    """Return sentence, mood and caveats.

    Args:
        record: A finished one, whose student's quality is known.
        beside: What is said of its quality against a teacher.
        fewer: What is said of its number of parameters.
    """
    subject = f"The {model_name(record, 'student')} model"
    clauses = [_kept(record, alone=not beside), *beside, *fewer, _lighter(record), _faster(record)]
    said = [clause for clause in clauses if clause]
    sentence = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return f"{subject} {sentence}.", _mood(record), tuple(_caveats(record))


def _kept(record: Record, *, alone: bool) -> str:
    metric, name = record["comparison"]["metric"], record["quantization"].get("judged")
    named, own = text.plain(metric, limit=30), record["models"]["student"]["quality"][metric]
    base = ((record["models"].get(name) or {}).get("quality") or {}).get(metric) if name else None
    if base is None:
        return f"reaches {named} {text.quality(own)}" if alone else ""
    drop, who = record["quantization"].get("quality_drop") or 0.0, control_name(record, str(name))
    if drop <= 0:
        return f"matches or exceeds the {who}'s {named} ({text.quality(own)}; {text.quality(base)} before)"
    pair = f"{text.quality(own)} of {text.quality(base)}"
    if text.is_share(metric) and base > 0:
        return f"keeps {100 * own / base:.1f} % of the {who}'s {named} ({pair}, {text.difference(drop, metric)} less)"
    return f"has {named} {text.quality(own)} ({who} {text.quality(base)})"


def _lighter(record: Record) -> str:
    found = quantized.sizes(record)
    if found is None:
        return ""
    said = f"takes {text.size(found[1])} on disk instead of {text.size(found[0])}"
    judged = record["quantization"].get("judged")
    whole = (record["models"].get(judged) or {}).get("size_bytes") if judged else None
    if not whole or whole == found[0]:
        return said
    return f"{said} in float and {text.size(whole)} of the {control_name(record, str(judged))}"


def _faster(record: Record) -> str:
    """Say the speed at the smallest batch size, each model in its best engine."""
    for row in quantized.speeds(record)[:1]:
        ratio, few, dense = row["ratio"], text.plain(row["few"], limit=40), text.plain(row["dense"], limit=40)
        name = control_name(record, row["model"])
        where = f"at batch {row['batch']} in {few} than the {name} in its best engine ({dense})"
        if 1 / RESOLVED < ratio < RESOLVED:
            return f"is no faster {where}"
        return f"is {text.times(max(ratio, 1 / ratio))} {'faster' if ratio > 1 else 'slower'} {where}"
    return ""


def _mood(record: Record) -> str:
    loss, found = quantized.loss_share(record), record.get("recommendation")
    if not record["quantization"]["totals"]["quantized"] or (loss is not None and loss > quantized.LARGE_LOSS):
        return "bad"
    pays = found is not None and found["file"] is not None
    if loss is None:
        return "mixed" if pays else "open"
    return "good" if pays and loss <= quantized.SMALL_LOSS else "mixed"


def _caveats(record: Record) -> list[str]:
    found, said = record.get("recommendation"), []
    if found:
        said.append(text.plain(found["why"], limit=600))
        said += quantized.alternatives(record)
    if record["quantization"].get("judged") is None:
        said.append(
            "There was no float control at the same budget, so what quantization cost in quality is not known "
            "(set baseline=true)."
        )
    said += [text.plain(words, limit=600) for words in (record.get("pruning") or {}).get("sentences", ())]
    said += [text.plain(words, limit=600) for words in record["quantization"]["sentences"]]
    if record["quantization"].get("judged") == "baseline":
        said.append(f"One seed ({record['seed']}): a difference this size can change with the seed.")
    return said
