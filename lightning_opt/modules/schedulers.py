"""Learning-rate schedules that end when training ends, whatever its length."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class _WarmUpThen:
    """A factor for the learning rate: linear warm-up, then one of the decays below."""

    def __init__(self, *, total_steps: int, warmup_fraction: float, final: float) -> None:
        self.warmup_steps = round(total_steps * warmup_fraction)
        self.decay_steps = max(total_steps - self.warmup_steps, 1)
        self.final = final

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.final + (1.0 - self.final) * self.decay(min((step - self.warmup_steps) / self.decay_steps, 1.0))

    def decay(self, done: float) -> float:
        """Return 1 at the start and 0 at the end; constant unless a subclass says otherwise."""
        return 1.0


class _Cosine(_WarmUpThen):
    def decay(self, done: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * done))


class _Linear(_WarmUpThen):
    def decay(self, done: float) -> float:
        return 1.0 - done


def cosine(optimizer: Optimizer, *, total_steps: int, warmup_fraction: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Warm up, then follow half a cosine down to `final` times the rate.

    Loshchilov, Hutter (2017), arXiv 1608.03983, equation 5, without restarts.
    """
    return _schedule(optimizer, _Cosine(total_steps=total_steps, warmup_fraction=warmup_fraction, final=final))


def linear(optimizer: Optimizer, *, total_steps: int, warmup_fraction: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Warm up, then fall in a straight line to `final` times the rate."""
    return _schedule(optimizer, _Linear(total_steps=total_steps, warmup_fraction=warmup_fraction, final=final))


def constant(optimizer: Optimizer, *, total_steps: int, warmup_fraction: float = 0.0) -> LambdaLR:
    """Warm up, then keep the rate."""
    return _schedule(optimizer, _WarmUpThen(total_steps=total_steps, warmup_fraction=warmup_fraction, final=0.0))


def _schedule(optimizer: Optimizer, factor: _WarmUpThen) -> LambdaLR:
    """Wrap a factor whose state is not worth saving: LambdaLR would write the object itself into the checkpoint."""
    return LambdaLR(optimizer, lambda step: factor(step))
