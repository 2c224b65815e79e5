"""Read the logged metrics of a run: `metrics.csv` as Lightning's CSVLogger writes it, one row per log call, sparse."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_opt.errors import StorageError

FILE_NAME = "metrics.csv"
_AXES = frozenset({"epoch", "step"})


@dataclass(frozen=True)
class Series:
    """One metric over time.

    Attributes:
        step: `(N,)` int64 optimizer steps, ascending.
        epoch: `(N,)` float64 epochs; NaN where none was logged.
        value: `(N,)` float64 values; they may hold NaN and infinity if the run logged them.
    """

    step: NDArray[np.int64]
    epoch: NDArray[np.float64]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.step)


def read_metrics(paths: Iterable[Path | str]) -> dict[str, Series]:
    """Read and merge the CSV files of one model, such as the parts before and after a resume.

    Where two rows give the same metric at the same step, the later row of the later file counts. A last line that a
    crash cut short, lines of a wrong width and cells that are no numbers are left out.

    Args:
        paths: CSV files, in the order in which they were written.

    Returns:
        Metric name -> `Series`, in the order of the columns. Empty for files without rows.

    Raises:
        StorageError: A file cannot be read.
    """
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for path in paths:
        for row in _rows(Path(path)):
            _collect(row, points)
    return {name: _series(of_step) for name, of_step in points.items()}


def _collect(row: Mapping[str, str], points: dict[str, dict[int, tuple[float, float]]]) -> None:
    step = _number(row.get("step", ""))
    if step is None or not math.isfinite(step):
        return
    epoch = _number(row.get("epoch", ""))
    for name, cell in row.items():
        value = _number(cell)
        if name not in _AXES and value is not None:
            points.setdefault(name, {})[int(step)] = (math.nan if epoch is None else epoch, value)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _series(of_step: Mapping[int, tuple[float, float]]) -> Series:
    steps = sorted(of_step)
    pairs = np.array([of_step[step] for step in steps], dtype=np.float64).reshape(-1, 2)
    return Series(step=np.array(steps, dtype=np.int64), epoch=pairs[:, 0], value=pairs[:, 1])


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines.pop()  # cut short: its last number may lack digits
    header: list[str] | None = None
    for cells in csv.reader(lines):
        if "step" in cells:  # also a second header, of a part that was appended after a resume
            header = cells
        elif header is not None and len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))


def find_metrics(run_dir: Path | str) -> dict[str, list[Path]]:
    """Find the metrics files of a run folder by model.

    `metrics.csv` belongs to the student; `metrics_NAME.csv` and `NAME/metrics.csv`, also with CSVLogger's
    `version_N` folder between, belong to the model NAME.

    Returns:
        Model name -> files in the order in which they were written.
    """
    root = Path(run_dir)
    found: dict[str, list[Path]] = {}
    for path in sorted(
        [*root.glob("metrics*.csv"), *root.glob("*/metrics.csv"), *root.glob("*/version_*/metrics.csv")]
    ):
        name = _owner(path.relative_to(root))
        if name is not None and path.is_file():
            found.setdefault(name, []).append(path)
    for root_version in sorted(root.glob("version_*/metrics.csv")):
        found.setdefault("student", []).append(root_version)
    return {name: sorted(set(paths), key=_written) for name, paths in found.items()}


def _owner(path: Path) -> str | None:
    if len(path.parts) > 1:
        return None if path.parts[0].startswith("version_") else path.parts[0]
    name = path.stem.removeprefix("metrics").strip("_-.")
    return name or "student"


def _written(path: Path) -> tuple[int, str]:
    version = path.parent.name.removeprefix("version_")
    return (int(version) if version.isdigit() else -1, str(path))


def run_metrics(run_dir: Path | str) -> dict[str, dict[str, Series]]:
    """Read every model's metrics of a run folder: model name -> metric name -> `Series`; empty if there are none."""
    tables = {name: read_metrics(paths) for name, paths in find_metrics(run_dir).items()}
    return {name: table for name, table in tables.items() if table}
