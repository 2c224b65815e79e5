"""Turn a run folder into `record.json`, `report.html`, `report.md` and figures; read nothing but run folders.

What draws or prints is loaded when it is first asked for: a command that only reads a record need not wait for
matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_opt.reporting.machine import environment
from lightning_opt.reporting.metrics import Series, find_metrics, read_metrics, run_metrics
from lightning_opt.reporting.ratios import comparison
from lightning_opt.reporting.record import (
    deployed_entry,
    finish,
    model_entry,
    new_record,
    read_record,
    update_record,
    write_record,
)
from lightning_opt.reporting.schema import Problem, problems, record_schema
from lightning_opt.reporting.verdict import Verdict, verdict

if TYPE_CHECKING:
    from lightning_opt.reporting.compare import render_comparison
    from lightning_opt.reporting.report import render
    from lightning_opt.reporting.terminal import summary

_LATER = {"render": "report", "render_comparison": "compare", "summary": "terminal"}

__all__ = [
    "Problem",
    "Series",
    "Verdict",
    "comparison",
    "deployed_entry",
    "environment",
    "find_metrics",
    "finish",
    "model_entry",
    "new_record",
    "problems",
    "read_metrics",
    "read_record",
    "record_schema",
    "render",
    "render_comparison",
    "run_metrics",
    "summary",
    "update_record",
    "verdict",
    "write_record",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"lightning_opt.reporting.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
