"""Print the end of a run: teacher, student alone and student in one short table."""

import io
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from lightning_opt.reporting import quantized, text
from lightning_opt.reporting.gains import best_engine
from lightning_opt.reporting.names import model_name
from lightning_opt.reporting.tables import model_order
from lightning_opt.reporting.verdict import verdict

Record = Mapping[str, Any]
_WIDTH = 100
_MOODS = {"good": "green", "mixed": "yellow", "bad": "red", "open": "default"}


def summary(record: Record, *, stream: TextIO | None = None) -> str:
    """Write the verdict and a table of the models for the end of a run.

    Args:
        record: The record as it was written.
        stream: Where it will be printed, standard output if not given: colours only on a terminal, and only
            characters that its encoding knows.
    """
    stream = sys.stdout if stream is None else stream
    coloured = bool(getattr(stream, "isatty", lambda: False)())
    encoding = getattr(stream, "encoding", None) or "utf-8"
    unicode = _encodes("─×–", encoding)
    written = io.StringIO()
    console = Console(
        file=written,
        width=None if coloured else _WIDTH,
        force_terminal=coloured,
        color_system="standard" if coloured else None,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    if record["models"]:
        console.print(_table(record, box.SIMPLE_HEAD if unicode else box.ASCII))
    said = verdict(record)
    console.print(Text(said.sentence, style=_MOODS[said.mood]), soft_wrap=True)
    for caveat in said.caveats:
        console.print(Text(caveat, style="dim"), soft_wrap=True)
    words = "\n".join(line.rstrip() for line in written.getvalue().splitlines()).strip("\n")
    return words if unicode else words.translate(_ASCII).encode(encoding, "replace").decode(encoding)


_ASCII = str.maketrans({"×": "x", "–": "-", "…": "~", "·": "-"})


def _encodes(characters: str, encoding: str) -> bool:
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _table(record: Record, lines: box.Box) -> RichTable:
    """Lay out one row a model: quality, parameters, size, latency, speed over the reference."""
    batch = _batch(record)
    metric = record["comparison"].get("metric")
    table = RichTable(box=lines, pad_edge=False, show_edge=False)
    table.add_column("")
    named = text.plain(metric, limit=20) if metric else "quality"
    heads = [named, "parameters", *(["not zero"] if record.get("pruning") else []), "size"]
    heads += [f"latency, batch {batch}{', best engine' if _in_best_engines(record) else ''}", "speed"] if batch else []
    for head in heads:
        table.add_column(Text(head), justify="right")
    order = ("teacher", "baseline", "dense", "float")
    reference = next((name for name in order if name in record["models"]), None)
    for name in model_order(record):
        cells = _cells(record, name, reference, metric, batch)
        table.add_row(*(Text(cell) for cell in cells), style="bold" if name == "student" else None)
    return table


def _batch(record: Record) -> int | None:
    batches = [row["batch"] for model in record["models"].values() for row in model["latency_ms"] or ()]
    return min(batches, default=None)


def _cells(record: Record, name: str, reference: str | None, metric: str | None, batch: int | None) -> list[str]:
    model = record["models"][name]
    cells = [model_name(record, name), text.quality((model["quality"] or {}).get(metric))]
    cells += [text.count(model["params"]), *([text.count(model["params_nonzero"])] if record.get("pruning") else [])]
    cells.append(text.size(model["size_bytes"]))
    if batch is None:
        return cells
    own = _latency(record, name, batch)
    over = _latency(record, reference, batch) if reference else None
    return [*cells, text.milliseconds(own), text.times(over / own) if over and own else text.DASH]


def _in_best_engines(record: Record) -> bool:
    """Tell whether each model is shown in its best engine: PyTorch eager has no fast integers."""
    return bool(record.get("quantization") and record["comparison"].get("quantized"))


def _latency(record: Record, name: str, batch: int) -> float | None:
    model = record["models"][name]
    if not _in_best_engines(record):
        return next((row["p50"] for row in model["latency_ms"] or () if row["batch"] == batch), None)
    if name == "student":
        row = quantized.fastest(record, batch)
        return row["p50"] if row else None
    best = best_engine(model, batch)
    return best[0] if best else None
