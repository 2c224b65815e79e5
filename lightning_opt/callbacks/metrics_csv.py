"""metrics.csv: every logged number of a run, also after it was stopped and went on."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

_FIRST = ("epoch", "step")


class MetricsCsv(Logger):
    """Write one row per log call: `epoch, step`, then a column per metric, empty where nothing was logged.

    Lightning's own CSV logger deletes the file when a run goes on after a stop. This one appends, and drops the rows
    that were written after the checkpoint from which the run goes on, so that they are not there twice.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = list(_FIRST)
        self.rows = 0

    @property
    @override
    def name(self) -> str:
        return "metrics"

    @property
    @override
    def version(self) -> str:
        return ""

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run folder holds the whole config."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"epoch": metrics.get("epoch", ""), "step": "" if step is None else step}
        row |= {name: repr(float(value)) for name, value in metrics.items() if name != "epoch"}
        if row["epoch"] != "":
            row["epoch"] = int(row["epoch"])
        new = [name for name in row if name not in self._columns]
        if new and self.rows:
            self._rewrite(self._read(), new)
        self._columns += [name for name in new if name not in self._columns]
        self._append(row)
        self.rows += 1

    def keep(self, rows: int) -> None:
        """Take up a file that an earlier start of this run wrote, and drop all rows after the first `rows`."""
        if not self.path.exists():
            return
        kept = self._read()[:rows]
        self._rewrite(kept, [])
        self.rows = len(kept)

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self._columns = list(reader.fieldnames or _FIRST)
            return [dict(row) for row in reader]

    def _rewrite(self, rows: list[dict[str, str]], new: list[str]) -> None:
        self._columns += [name for name in new if name not in self._columns]
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        partial.write_text(text.getvalue(), encoding="utf-8", newline="")
        os.replace(partial, self.path)

    def _append(self, row: Mapping[str, Any]) -> None:
        fresh = self.rows == 0
        if fresh:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            if fresh:
                writer.writeheader()
            writer.writerow(row)


class LogPosition(pl.Callback):
    """Remember in the checkpoint how many rows `metrics.csv` had.

    Acts when a checkpoint is written and when one is loaded; leaves one number there; works with every strategy.
    """

    def __init__(self, log: MetricsCsv) -> None:
        self._log = log

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._log.rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rank_zero_only(self._log.keep)(state_dict["rows"])
