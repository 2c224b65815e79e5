"""Call everything in turn and keep the CPU time and the wall time of each call."""

import gc
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Samples = dict[str, np.ndarray]


def interleaved(calls: Mapping[str, Callable[[], Any]], *, seconds: float, least: int = 5) -> Samples:
    """Call each once a round, in another random order each round, until time is over.

    Returns:
        `(rounds, 2)` by name: CPU and wall milliseconds of each call. The CPU time is that of all threads of this
        process; one call runs at a time, and all engines are held to one thread.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    order = np.random.default_rng(0)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            for call in calls.values():
                call()
            begun = time.perf_counter()
            while len(next(iter(found.values()))) < least or time.perf_counter() - begun < seconds:
                for name in order.permutation(list(calls)).tolist():
                    call, wall, cpu = calls[name], time.perf_counter(), time.process_time()
                    call()
                    cpu = time.process_time() - cpu
                    found[name].append((1e3 * cpu, 1e3 * (time.perf_counter() - wall)))
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in found.items()}


def summary(samples: Samples) -> dict[str, dict[str, float]]:
    """Return medians and the CPU time's quartiles by name, in milliseconds."""
    found = {}
    for name, values in samples.items():
        low, mid, high = np.quantile(values[:, 0], [0.25, 0.5, 0.75])
        found[name] = {
            "cpu_ms": float(mid),
            "cpu_ms_q25": float(low),
            "cpu_ms_q75": float(high),
            "wall_ms": float(np.median(values[:, 1])),
            "rounds": len(values),
        }
    return found


def speedup(samples: Samples, dense: str, small: str, *, clock: int = 0) -> dict[str, float]:
    """Return the ratio of the medians, with a bootstrap interval of 95 % over rounds; clock 0: CPU, 1: wall."""
    above, below = samples[dense][:, clock], samples[small][:, clock]
    random = np.random.default_rng(0)
    rounds = random.integers(len(above), size=(1000, len(above)))
    others = rounds if len(below) == len(above) else random.integers(len(below), size=(1000, len(below)))
    drawn = np.median(above[rounds], axis=1) / np.median(below[others], axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": float(np.median(above) / np.median(below)), "low": float(low), "high": float(high)}


def load() -> float:
    return os.getloadavg()[0]


def judged(samples: Samples, sizes: Mapping[str, int], *, limit: float | None) -> dict[str, Any]:
    """Return by network: the ratio of multiply-accumulates, speed-up by engine, and best engine against best engine."""
    medians, found = summary(samples), {}
    engines = list(dict.fromkeys(name.partition("|")[2] for name in samples))
    fastest = {name: min(engines, key=lambda engine: medians[f"{name}|{engine}"]["cpu_ms"]) for name in sizes}
    for name, count in sizes.items():
        ratio = sizes["dense"] / count
        speedups = {engine: speedup(samples, f"dense|{engine}", f"{name}|{engine}") for engine in engines}
        pair = (f"dense|{fastest['dense']}", f"{name}|{fastest[name]}")
        best = speedup(samples, *pair)
        found[name] = {
            "macs": count,
            "mac_ratio": ratio,
            "times": {engine: medians[f"{name}|{engine}"] for engine in engines},
            "speedup": speedups,
            "efficiency": {engine: each["value"] / ratio for engine, each in speedups.items()},
            "best_engine": fastest[name],
            "best_speedup": best,
            "best_efficiency": best["value"] / ratio,
            "best_efficiency_wall": speedup(samples, *pair, clock=1)["value"] / ratio,
            "limit": limit,
            "holds": None if limit is None else best["value"] / ratio >= limit,
        }
    return found
