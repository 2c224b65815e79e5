"""What the parts of a network cost, and how they are shared out evenly."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_opt.forward import Inputs, logits_of
from lightning_opt.strategies.pipeline.stages import Stage

_REPEATS = 3


def balanced(costs: Sequence[float], parts: int, *, allowed: Callable[[int, int], bool] | None = None) -> list[int]:
    """Cut a row of costs into contiguous parts so that the dearest part is as cheap as possible.

    Args:
        costs: At least as many as there are parts.
        parts: How many parts.
        allowed: Whether the items from `start` up to `end` may be one part. None: all may.

    Returns:
        Where each part but the first begins, increasing; empty where it cannot be done.

    >>> balanced([1.0, 1.0, 1.0, 3.0], 2)
    [3]
    """
    count = len(costs)
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    best = [[math.inf] * (parts + 1) for _ in range(count + 1)]
    begin = [[0] * (parts + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for end in range(part, count + 1):
            for start in range(part - 1, end):
                dearest = max(best[start][part - 1], before[end] - before[start])
                if dearest < best[end][part] and (allowed is None or allowed(start, end)):
                    best[end][part], begin[end][part] = dearest, start
    if math.isinf(best[count][parts]):
        return []
    starts, end = [], count
    for part in range(parts, 0, -1):
        end = begin[end][part]
        starts.append(end)
    return sorted(starts)[1:]


def measure(stages: Sequence[Stage], inputs: Inputs) -> list[float]:
    """Return the seconds that forward and backward of each stage take on example inputs, the fastest of a few runs."""
    received: Tensor | None = None
    seconds = []
    for stage in stages:
        runs = [_once(stage, received, inputs) for _ in range(_REPEATS)]
        seconds.append(min(run[0] for run in runs))
        received = runs[-1][1]
    return seconds


def _once(stage: Stage, received: Tensor | None, inputs: Inputs) -> tuple[float, Tensor]:
    given = None if received is None else received.detach().requires_grad_(received.is_floating_point())
    begin = _now()
    with torch.enable_grad():
        said = stage(given, inputs)
        said = logits_of(said) if stage.is_last else said
        if said.requires_grad:
            wanted = [*stage.network.model.parameters(), *([] if given is None else [given])]
            wanted = [one for one in wanted if one.requires_grad]
            torch.autograd.grad(said.float().sum(), wanted, allow_unused=True)
    return _now() - begin, said.detach()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
