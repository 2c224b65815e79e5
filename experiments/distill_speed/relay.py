"""Let several training loops run step by step in turn, each in a thread of its own.

A `Trainer.fit` cannot be paused from outside, but a callback can wait. So every contender is one running loop, and a
baton goes round: exactly one loop moves at any time, by one block of steps, and what is measured is that block.
"""

import ctypes
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch

# Numbers of glibc's mallopt: M_ARENA_MAX, M_MMAP_THRESHOLD (32 MiB at most), M_TRIM_THRESHOLD.
_MALLOC = ((-8, 1), (-3, 32 << 20), (-1, 2**31 - 1))

Lap = Callable[[], bool]
Body = Callable[[Lap], None]


def share_one_heap() -> bool:
    """Let all threads allocate from one heap that keeps what is freed; False where the C library has no such switch.

    Otherwise each thread has a heap of its own, and how that one happens to be cut up decides how many pages a step has
    to fetch from the system again: a few percent, different for each contender and constant through a run.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(number, value) for number, value in _MALLOC)


@dataclass(frozen=True)
class Times:
    """Seconds of one step, a mean over its block: of all the process's threads on the CPU, and on the clock."""

    cpu_s: float
    wall_s: float


class Runner:
    """Run one contender in a thread that moves only when it is told to.

    Args:
        name: What the table calls it.
        body: The loop. It calls `lap()` at the start of each step, which waits at the end of a block; False means stop.
        block: Steps it does when it is its turn.
    """

    def __init__(self, name: str, body: Body, *, block: int = 1) -> None:
        self.name, self.block = name, block
        self._body = body
        self._go, self._waiting = threading.Semaphore(0), threading.Semaphore(0)
        self._begun: tuple[float, float] | None = None
        self._last: Times | None = None
        self._left = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Let the contender set itself up, until it waits for its first step."""
        self._thread.start()
        self._await()

    def step(self) -> Times:
        """Let it do one block, from the start of one batch to the start of another."""
        self._go.release()
        self._await()
        assert self._last is not None
        return self._last

    def stop(self) -> None:
        self._stopping = True
        self._go.release()
        self._thread.join()

    def _await(self) -> None:
        self._waiting.acquire()
        if self._error is not None:
            raise RuntimeError(f"{self.name} failed") from self._error

    def _run(self) -> None:
        torch.set_num_threads(1)  # each thread has its own number
        try:
            self._body(self._lap)
        except BaseException as error:
            self._error = error
        finally:
            self._waiting.release()

    def _lap(self) -> bool:
        if self._left > 1:
            self._left -= 1
            return True
        # All threads but this one wait, so the process's time is this contender's, helper threads included.
        if self._begun is not None:
            cpu, wall = time.process_time() - self._begun[0], time.perf_counter() - self._begun[1]
            self._last = Times(cpu / self.block, wall / self.block)
        if self._stopping:
            return False
        self._waiting.release()
        self._go.acquire()
        self._left = self.block
        self._begun = time.process_time(), time.perf_counter()
        return not self._stopping


def race(
    runners: list[Runner], *, turns: dict[str, int], seconds: float, warmup: int, at_most: int, at_least: int = 3
) -> dict[str, list[Times]]:
    """Go round until the time is over, in another order each round; return the mean of each runner's turns by round.

    Args:
        runners: All of them started.
        turns: How often a round a runner's turn comes, where it is not once: cheap steps need more of them.
        seconds: When no further round begins.
        warmup: Rounds that are not counted.
        at_most: Rounds.
        at_least: Rounds.
    """
    # Not a rotation: each would then always follow the same one, and find its caches as that one left them.
    draw, order = random.Random(0), [runner for runner in runners for _ in range(turns.get(runner.name, 1))]
    times: dict[str, list[Times]] = {runner.name: [] for runner in runners}
    end = time.perf_counter() + seconds
    for turn in range(-warmup, at_most):
        if turn >= at_least and time.perf_counter() > end:
            break
        draw.shuffle(order)
        taken: dict[str, list[Times]] = {name: [] for name in times}
        for runner in order:
            taken[runner.name].append(runner.step())
        if turn >= 0:
            for name, steps in taken.items():
                times[name].append(Times(fmean(s.cpu_s for s in steps), fmean(s.wall_s for s in steps)))
    return times
