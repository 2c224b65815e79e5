"""Time exported files side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_opt.evaluation.inputs import at_batch
from lightning_opt.evaluation.latency import MIN_CALLS, latency_row, time_interleaved
from lightning_opt.export.runner import Runner
from lightning_opt.forward import Inputs

Rows = list[dict[str, float | int | None]]


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """How the exported files are timed, side by side.

    Attributes:
        batch_sizes: Batches to time.
        rounds: Rounds per batch size.
        min_rounds: Rounds that are timed even when the time is over.
        max_seconds: Time for all batch sizes together.
    """

    batch_sizes: Sequence[int] = (1, 32)
    rounds: int = 100
    min_rounds: int = 20
    max_seconds: float = 6.0


def time_runners(runners: Mapping[str, Runner], example_inputs: Inputs, plan: LatencyPlan) -> dict[str, Rows]:
    """Return `[{batch, p50, p95, p99}, ...]` in ms for each runner; a percentile of too few calls is None."""
    rows: dict[str, Rows] = {name: [] for name in runners}
    for batch in plan.batch_sizes if runners else ():
        inputs = at_batch(example_inputs, batch)
        timings = time_interleaved(
            {name: runner.bind(inputs) for name, runner in runners.items()},
            rounds=plan.rounds,
            min_rounds=plan.min_rounds,
            max_seconds=plan.max_seconds / len(plan.batch_sizes),
        )
        for name, samples in timings.samples_ms.items():
            rows[name].append(latency_row(samples, batch=batch))
    return rows


def explain_latency(entry: dict[str, Any]) -> None:
    """Say in an entry's reasons why a latency in it is None."""
    rows = entry["latency_ms"]
    if not rows:
        entry["latency_ms"], entry["reasons"]["latency_ms"] = None, "not timed here"
    elif any(value is None for row in rows for value in row.values()):
        needed = ", ".join(f"p{p} {calls}" for p, calls in MIN_CALLS.items() if calls > 1)
        entry["reasons"]["latency_ms"] = f"too few calls in the time given for some percentiles ({needed})"
