"""How a sweep's values and objectives are called and written."""

from collections.abc import Callable

from lightning_opt.reporting import text
from lightning_opt.reporting.sweeps import Point


def title_of(objective: str) -> str:
    """Name an objective for people."""
    known = {"val": "validation value", "latency_ms": "latency", "size_bytes": "size on disk", "params": "parameters"}
    known |= {"params_nonzero": "non-zero parameters", "flops": "FLOPs"}
    return known.get(objective) or text.plain(objective.replace("test/", "test "), limit=30)


def written(name: str, value: float | None) -> str:
    """Write a measure with its unit."""
    writers: dict[str, Callable[[float | None], str]] = {
        "latency_ms": text.milliseconds,
        "size_bytes": text.size,
        "params": text.count,
        "params_nonzero": text.count,
        "flops": text.count,
    }
    return writers.get(name, text.quality)(value)


def label_of(point: Point) -> str:
    """Say in words what sets a point apart."""
    return text.plain(" ".join(f"{key}={short(value)}" for key, value in point.values.items()), limit=160)


def short(value: str) -> str:
    """Write a drawn number with four digits."""
    try:
        return value if len(value) <= 8 else f"{float(value):.4g}"
    except ValueError:
        return value
