"""Time several callables side by side, so that a busy machine is unfair to none of them.

Each round calls every callable once, starting one further on than the round before. Threads are fixed, garbage
collection is off while the clock runs, and the machine's load is noted before and after.
"""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Fewer calls than these cannot tell the percentile from the largest value.
MIN_CALLS = {50: 1, 95: 20, 99: 100}
_NOISY_SPREAD = 1.5


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The calls that were timed, and how quiet the machine was.

    Attributes:
        samples_ms: Milliseconds of each timed call, by name.
        load_average: Running processes (1 minute) before and after; None where the system does not say.
        cores: Cores that the process may use.
    """

    samples_ms: Mapping[str, tuple[float, ...]]
    load_average: tuple[float | None, float | None]
    cores: int

    def spread(self, name: str) -> float | None:
        """Return p95 / p50 of one callable; None when it was called too seldom."""
        p95, p50 = percentile_ms(self.samples_ms[name], 95), percentile_ms(self.samples_ms[name], 50)
        return p95 / p50 if p95 is not None and p50 else None

    def noisy(self, name: str) -> bool:
        """Tell whether the machine was too busy for the numbers to be trusted closely."""
        load = max((value for value in self.load_average if value is not None), default=0.0)
        spread = self.spread(name)
        return load > self.cores or (spread is not None and spread > _NOISY_SPREAD)


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 200,
    min_rounds: int = 10,
    warmup_rounds: int = 3,
    max_seconds: float = 10.0,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Call each of `calls` once a round, in rotating order, and keep the time of every call.

    Args:
        calls: What to time, by name.
        rounds: Rounds to time.
        min_rounds: Rounds that are timed even when `max_seconds` is over.
        warmup_rounds: Rounds before the clock counts; cut to one when they take a fifth of `max_seconds`.
        max_seconds: Time after which no round starts beyond `min_rounds`.
        synchronize: Waits for the device before and after each call.
        clock: Seconds; monotonic.

    Raises:
        ValueError: Nothing to time, or `rounds` below 1.
    """
    if not calls or rounds < 1:
        raise ValueError(
            f"there must be something to time and at least one round; got {len(calls)} calls, {rounds} rounds"
        )
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    before = _load_average()
    with torch.inference_mode(), _no_garbage_collection():
        _warm_up(calls, rounds=warmup_rounds, max_seconds=max_seconds / 5, clock=clock)
        start = clock()
        for turn in range(rounds):
            if turn >= min_rounds and clock() - start > max_seconds:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(_time_once(calls[name], synchronize, clock))
    return Timings(
        samples_ms={name: tuple(values) for name, values in samples.items()},
        load_average=(before, _load_average()),
        cores=usable_cores(),
    )


def percentile_ms(samples_ms: tuple[float, ...], percent: int) -> float | None:
    """Return a percentile by linear interpolation; None when there are too few samples for it (`MIN_CALLS`)."""
    if len(samples_ms) < MIN_CALLS.get(percent, 1):
        return None
    return float(np.percentile(samples_ms, percent))


def latency_row(samples_ms: tuple[float, ...], *, batch: int) -> dict[str, float | int | None]:
    """Return one row of the record's `latency_ms`: percentiles, and on busy machines the least disturbed calls.

    Returns:
        `batch, p50, p95, p99` (None where there are too few calls for it), `p10` and `min`, in milliseconds.
    """
    row: dict[str, float | int | None] = {"batch": batch}
    row |= {f"p{percent}": percentile_ms(samples_ms, percent) for percent in MIN_CALLS}
    return row | {"p10": percentile_ms(samples_ms, 10), "min": float(min(samples_ms))}


@contextlib.contextmanager
def fixed_threads(threads: int | None) -> Iterator[int]:
    """Hold PyTorch to `threads` CPU threads, yield their number, and restore it; None keeps the number as it is.

    Raises:
        ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1; got {threads}")
    before = torch.get_num_threads()
    if threads is not None and threads != before:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def synchronizer(device: torch.device | str) -> Callable[[], None]:
    """Return what waits until `device` has done its queued work; nothing to wait for on a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if kind == "mps":
        return torch.mps.synchronize
    return lambda: None


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _time_once(call: Callable[[], Any], synchronize: Callable[[], Any] | None, clock: Callable[[], float]) -> float:
    if synchronize is not None:
        synchronize()
    start = clock()
    call()
    if synchronize is not None:
        synchronize()
    return (clock() - start) * 1e3


def _warm_up(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, max_seconds: float, clock: Callable[[], float]
) -> None:
    start = clock()
    for turn in range(rounds):
        if turn and clock() - start > max_seconds:
            return
        for call in calls.values():
            call()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
