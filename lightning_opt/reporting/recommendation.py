"""Say which artifact to deploy on this machine, and why: the fastest whose quality is good enough."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_opt.reporting import text
from lightning_opt.reporting.gains import (
    batches_of,
    file_label,
    is_noisy,
    is_quantized,
    median_ms,
    precision_of,
    steady_ms,
)
from lightning_opt.reporting.ratios import engine_label, engines

Model = Mapping[str, Any]
Reader = Callable[[Model, int], float | None]
# Interleaved medians on a shared machine do not tell smaller differences apart.
RESOLVED = 1.05
# What quality may be lost, where the config does not say: half a point of a share, a hundredth of anything else.
SHARE_LOSS, RELATIVE_LOSS = 0.005, 0.01
_FORMATS = {"onnx runtime": "onnx", "openvino": "openvino", "torch export": "torch_export"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to deploy.

    Attributes:
        label: Engine and number format.
        model: Name in the record's `models`.
        quality: Value of the main metric, None if it is not known.
        likely: That of the model itself, where it is not known in this engine.
        times: Median ms by batch size; the 10th percentile where the machine was busy.
        size_bytes: Of the file, or of the weights.
        entry: The deployed file; None for an engine of a float model that has no file.
    """

    label: str
    model: str
    quality: float | None
    likely: float | None
    times: Mapping[int, float]
    size_bytes: int | None
    entry: Model | None = None
    engine: str = ""
    dtype: str = "fp32"


def recommendation(
    models: Mapping[str, Model],
    deployed: Sequence[Model],
    *,
    metric: str | None,
    higher_is_better: bool = True,
    reference: str,
    judged: str | None,
    max_drop: float | None = None,
) -> dict[str, Any] | None:
    """Choose among the files of few bits and the engines of the float model, by speed over all batch sizes.

    A file of few bits is recommended where it loses at most `max_drop` and is at least as fast as the float model in
    its best engine; otherwise the float model is.

    Args:
        models: The record's models.
        deployed: The record's deployed files.
        metric: The main metric.
        higher_is_better: Its direction.
        reference: Name of the float model whose engines were timed beside the files.
        judged: Name of the float model that quality is compared with; None where there is none.
        max_drop: Largest loss of the main metric; None is half a point of a share, or a hundredth of any other value.

    Returns:
        `format, engine, precision, file, model, basis, batches, quality, quality_drop, size_bytes, size_ratio,
        by_batch, max_drop, why`; `basis` is the percentile of latency that it rests on: the median or, where the
        machine was busy, the 10th. None where nothing was timed.
    """
    base = ((models.get(judged) or {}).get("quality") or {}).get(metric) if judged else None
    busy = any(is_noisy(part) for part in (models.get(reference) or {}, *filter(is_quantized, deployed)))
    read = steady_ms if busy else median_ms
    few = _files(deployed, metric, read)
    dense = [each for name in dict.fromkeys((reference, judged)) for each in _engines(models, name, metric, read)]
    if not few or not dense:
        return None
    sign = 1.0 if higher_is_better else -1.0
    limit = _limit(metric, base, max_drop)

    def drop(choice: Choice) -> float | None:
        return None if base is None or choice.quality is None else sign * (base - choice.quality)

    good = [choice for choice in few if _loss(base, choice.likely, sign) <= limit]
    sound = [choice for choice in dense if _loss(base, choice.likely, sign) <= limit]
    fastest, rival = _fastest(good or few), _fastest(sound or dense)
    chosen = fastest if good and _ratio(rival, fastest) >= 1.0 else rival
    if chosen is rival:  # a faster file may have been left out for its quality: that is the one to speak of
        fastest = _fastest(few)
    who = "dense" if rival.model != reference else "float"
    said = _why(fastest, rival, drop(fastest), limit, metric, chosen=chosen, who=who)
    found = _plain(chosen, drop(chosen), fastest, rival, models[reference].get("size_bytes"))
    if busy:
        said += " The machine was busy while this was timed: it rests on the least disturbed tenth of the calls."
    found["basis"] = "p10" if busy else "p50"
    return {**found, "by_batch": _by_batch([*good, *(sound or dense)]), "max_drop": limit, "why": said}


def _loss(base: float | None, quality: float | None, sign: float) -> float:
    """Return what is lost of a quality; 0 where that is not known: then it rules nothing out."""
    return 0.0 if base is None or quality is None else sign * (base - quality)


def _limit(metric: str | None, base: float | None, asked: float | None) -> float:
    if asked is not None:
        return asked
    return SHARE_LOSS if text.is_share(metric or "") else RELATIVE_LOSS * abs(base or 0.0)


def _files(deployed: Sequence[Model], metric: str | None, read: Reader) -> list[Choice]:
    return [
        Choice(
            label=file_label(entry),
            model="student",
            quality=(entry.get("quality") or {}).get(metric),
            likely=(entry.get("quality") or {}).get(metric),
            times={batch: read(entry, batch) or 0.0 for batch in batches_of(entry)},
            size_bytes=entry.get("size_bytes"),
            entry=entry,
            engine=file_label(entry).removesuffix(f" {precision_of(entry)}"),
            dtype=precision_of(entry),
        )
        for entry in deployed
        if is_quantized(entry) and batches_of(entry)
    ]


def _engines(models: Mapping[str, Model], name: str | None, metric: str | None, read: Reader) -> list[Choice]:
    """List the engines of the float model; one that rounds is judged by its own quality, where that was taken."""
    model = models.get(name or "") or {}
    base = (model.get("quality") or {}).get(metric)
    found = []
    for engine in engines(model):
        if engine.get("dense", True) and batches_of(engine):
            dtype = text.short_dtype(engine["dtype"])
            own = (engine.get("quality") or {}).get(metric)
            found.append(
                Choice(
                    label=engine_label(engine),
                    model=str(name),
                    quality=own if own is not None else base if dtype == "fp32" else None,
                    likely=own if own is not None else base,
                    times={batch: read(engine, batch) or 0.0 for batch in batches_of(engine)},
                    size_bytes=model.get("size_bytes"),
                    engine=str(engine["engine"]),
                    dtype=dtype,
                )
            )
    return found


def _fastest(choices: Sequence[Choice]) -> Choice:
    """Return the choice with the smallest product of latencies, among those that were timed at the most batch sizes."""
    most = max(len(choice.times) for choice in choices)
    return min(
        (choice for choice in choices if len(choice.times) == most), key=lambda choice: math.prod(choice.times.values())
    )


def _ratio(slow: Choice, fast: Choice) -> float:
    """Return the geometric mean of how many times faster the second is, over the batch sizes of both."""
    shared = [batch for batch in slow.times if batch in fast.times]
    return math.prod(slow.times[batch] / fast.times[batch] for batch in shared) ** (1 / len(shared)) if shared else 0.0


def _by_batch(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """List the fastest way at each batch size, among those whose quality is good enough."""
    rows = []
    for batch in sorted({batch for choice in choices for batch in choice.times}):
        best = min((choice for choice in choices if batch in choice.times), key=lambda choice: choice.times[batch])
        rows.append({"batch": batch, "engine": best.label, "model": best.model, "ms": best.times[batch]})
    return rows


def _plain(chosen: Choice, drop: float | None, fastest: Choice, rival: Choice, before: int | None) -> dict[str, Any]:
    other = rival if chosen is fastest else fastest
    entry = chosen.entry or {}
    return {
        "format": entry.get("format") or _FORMATS.get(chosen.engine.lower(), chosen.engine),
        "engine": chosen.engine,
        "precision": chosen.dtype,
        "file": entry.get("file"),
        "model": chosen.model,
        "quality": chosen.quality,
        "quality_drop": drop,
        "size_bytes": chosen.size_bytes,
        "size_ratio": before / chosen.size_bytes if before and chosen.size_bytes else None,
        "batches": [
            {
                "batch": batch,
                "ms": time,
                "over": other.label,
                "over_model": other.model,
                "ratio": other.times[batch] / time,
            }
            for batch, time in chosen.times.items()
            if batch in other.times
        ],
    }


def _why(
    fastest: Choice,
    rival: Choice,
    drop: float | None,
    limit: float,
    metric: str | None,
    *,
    chosen: Choice,
    who: str,
) -> str:
    """Say it in one sentence: what to deploy, what it gains at each batch size, its size, and what it costs."""
    ratio = _ratio(rival, fastest)
    speed, size, quality = _speed(fastest, rival), _smaller(rival, fastest), _cost(drop, metric)
    if chosen is fastest:
        gain = f"{speed} than" if ratio >= RESOLVED else "as fast as"
        return f"Deploy {_file(fastest)}: {gain} the {who} model's best engine ({rival.label}), {size}; {quality}."
    where = f"Deploy the {who} model in {rival.label}"
    if ratio >= 1.0:
        allowed = text.difference(limit, metric or "")
        return f"{where}: {fastest.label} is {speed} and {size}, but {quality}, and at most {allowed} may be lost."
    return (
        f"{where}: few bits do not pay on this machine. Their fastest file ({fastest.label}) is {speed}; it is {size}, "
        f"and {quality}."
    )


def _file(choice: Choice) -> str:
    file = (choice.entry or {}).get("file")
    return f"{text.plain(file, limit=60)} ({choice.label})" if file else choice.label


def _speed(fast: Choice, slow: Choice) -> str:
    parts = [_factor(slow.times[b] / fast.times[b], b) for b in sorted(fast.times) if b in slow.times]
    return " and ".join(parts)


def _factor(ratio: float, batch: int) -> str:
    if ratio >= 1:
        return f"{ratio:.2f}× faster at batch {batch}"
    return f"{1 / ratio:.2f}× slower at batch {batch}"


def _smaller(before: Choice, after: Choice) -> str:
    if not before.size_bytes or not after.size_bytes:
        return "of unknown size"
    ratio = before.size_bytes / after.size_bytes
    return f"{text.times(ratio)} smaller" if ratio >= 1 else f"{text.times(1 / ratio)} larger"


def _cost(drop: float | None, metric: str | None) -> str:
    name = text.plain(metric or "quality", limit=30)
    if drop is None:
        return f"what that costs in {name} is not known"
    if abs(drop) < (5e-4 if text.is_share(metric or "") else 1e-12):
        return f"its {name} is the same"
    return f"its {name} is {text.difference(drop, metric or '')} {'worse' if drop > 0 else 'better'}"
