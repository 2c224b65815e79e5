"""Say how far a run came that is not finished: from its curves, its checkpoints and its finished fits."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_opt.reporting import text
from lightning_opt.reporting.curves import Tables, validation_key

_FITS = {"baseline": "the model alone", "student": "the model"}


def how_far(folder: Path, record: Mapping[str, Any], tables: Tables) -> list[str]:
    """List one sentence for each model of the run that began to train; nothing for a finished run.

    Args:
        folder: The run folder.
        record: Its record; only the status counts.
        tables: Its metrics, as `run_metrics` reads them.
    """
    if record["status"] == "finished":
        return []
    said = [_of_model(_place(folder, name), words, tables.get(name, {})) for name, words in _FITS.items()]
    return [sentence for sentence in said if sentence] or ["No training step was logged."]


def _place(folder: Path, name: str) -> Path:
    return folder if name == "student" else folder / name


def _of_model(folder: Path, name: str, table: Mapping[str, Any]) -> str:
    done = _finished_fit(folder / "fit.json")
    if done:
        return f"{name[:1].upper()}{name[1:]} is fully trained{done}."
    steps = max((int(series.step[-1]) for series in table.values() if len(series)), default=None)
    if steps is None:
        return ""
    words = f"{name[:1].upper()}{name[1:]} came as far as step {steps}{_epoch(table)}{_value(table)}"
    last = folder / "checkpoints" / "last.ckpt"
    return f"{words}; {'a checkpoint to resume from is there' if last.exists() else 'it left no checkpoint'}."


def _finished_fit(path: Path) -> str:
    """Return words on a fit that is done, with its test quality; empty if there is none or it is not readable."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        name, value = next(iter(facts["quality"].items()))
        return f" ({int(facts['steps'])} steps, test {text.plain(name, limit=30)} {text.quality(float(value))})"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration):
        return ""


def _epoch(table: Mapping[str, Any]) -> str:
    epochs = [float(series.epoch[-1]) for series in table.values() if len(series)]
    known = [epoch for epoch in epochs if math.isfinite(epoch)]
    return f" (epoch {max(known):.0f})" if known else ""


def _value(table: Mapping[str, Any]) -> str:
    key = validation_key(None, {"student": table})
    series = table.get(key) if key else None
    if series is None or not math.isfinite(float(series.value[-1])):
        return ""
    return f", where {text.plain(key, limit=40)} was last {text.quality(float(series.value[-1]))}"
