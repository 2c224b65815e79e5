"""The module that stands for the quantization of one tensor of a network."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.quantization.functional import (
    dequantize,
    dynamic_fake_quantize,
    fake_quantize,
    lsq,
    pact,
    quantize,
    scale_and_zero_point,
)
from lightning_opt.quantization.grid import Grid
from lightning_opt.quantization.observers import MinMax, Observer, ObserverState
from lightning_opt.quantization.ops import SMALLEST_RANGE, Switch

CALIBRATING = Switch()


def calibrating() -> AbstractContextManager[None]:
    """Make quantizers observe although the model is in eval mode."""
    return CALIBRATING.on()


def is_calibrating() -> bool:
    """Return whether `calibrating()` is entered."""
    return CALIBRATING.is_on


class FakeQuantizer(nn.Module):
    """Rounds a tensor to its grid, once it is enabled; until then it returns what it is given.

    An activation has an `observer`, which sees each tensor while `observing` is on, in training or in `calibrating()`.
    A weight (`observer=None`) has its range read anew from each tensor while `observing`. `freeze` ends both. While
    enabled and observing, the scale follows what is seen, if finding the range is cheap (`Observer.is_cheap`); one that
    is not, or is learned, is found from the first tensor, and again by `fit`.

    Args:
        grid: The values that the tensor may take.
        observer: How the range is found; None reads the smallest and the largest value of each tensor (weights).
        learnable: The scale is a parameter: learned step size (`functional.lsq`), or PACT with `clip`.
        clip: The scale is a parameter that learns from clipped values only (`functional.pact`).
        dynamic: The range is that of each tensor itself, always; nothing is kept.
        channels: How many scales there are; `fit`, `resize` and loading a state change it.

    Attributes:
        enabled: Whether tensors are rounded.
        observing: Whether ranges are looked for.
        scale: `(n,)`, a buffer or a parameter.
        zero_point: int32 `(n,)`.
        fitted: bool `(1,)`: scale and zero point come from data.
    """

    scale: Tensor
    zero_point: Tensor
    fitted: Tensor

    def __init__(
        self,
        grid: Grid,
        *,
        observer: Observer | None = None,
        learnable: bool = False,
        clip: bool = False,
        dynamic: bool = False,
        channels: int = 1,
    ) -> None:
        super().__init__()
        if dynamic and (grid.axis is not None or learnable or clip):
            raise ValueError("dynamic=True: a range that is found anew each time has one scale and nothing to learn")
        self.grid, self.spec, self.clip, self.dynamic = grid, observer, clip, dynamic
        self.learnable = learnable or clip
        self.enabled, self.observing = False, True
        self._is_empty = True  # as `fitted` says, for code that must not wait for the device
        scale = torch.ones(channels)
        if self.learnable:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.full((channels,), grid.fixed_zero_point or 0, dtype=torch.int32))
        self.register_buffer("fitted", torch.zeros(1, dtype=torch.bool))
        self.observer: ObserverState | None = None
        if observer is not None and not dynamic:
            self.observer = observer.start(grid, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, rounded to the grid if enabled; its shape and dtype stay."""
        if self.observing and not self.dynamic and (self.training or CALIBRATING.is_on):
            self._observe(x)
        if not self.enabled:
            return x
        if self.dynamic:
            return dynamic_fake_quantize(x, self.grid)
        if self.learnable:
            return (pact if self.clip else lsq)(x, self.positive_scale(), self.zero_point, self.grid)
        is_covered = self.observing and self.spec is None and self.training
        return fake_quantize(x, self.scale, self.zero_point, self.grid, is_covered=is_covered)

    def positive_scale(self) -> Tensor:
        """Return the scale; a learned one is held above 0, which an optimizer's step may have gone past."""
        if not self.learnable:
            return self.scale
        if not self.training:
            return self.scale.clamp(min=SMALLEST_RANGE)
        self.scale.data.clamp_(min=SMALLEST_RANGE)  # `.data`: it may be in use in this very graph
        return self.scale

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if self.observer is not None:
            self.observer.update(x)
        is_due = not self.learnable and (self.spec is None or self.spec.is_cheap)
        if self.enabled and (is_due or self._is_empty):
            self._set(*(self.observer.range() if self.observer is not None else MinMax().of(x, self.grid)))

    def _set(self, low: Tensor, high: Tensor) -> None:
        scale, zero_point = scale_and_zero_point(low, high, self.grid)
        self.resize(scale.numel())
        self.scale.detach().copy_(scale)
        self.zero_point.copy_(zero_point)
        self.fitted.fill_(True)
        self._is_empty = False

    @torch.no_grad()
    def fit(self, x: Tensor | None = None) -> None:
        """Find scale and zero point, from what has been observed or from `x`.

        Raises:
            ValueError: Nothing is given and there is no observer.
        """
        if self.dynamic:
            return
        if x is not None:
            self._set(*(self.spec or MinMax()).of(x, self.grid))
        elif self.observer is not None:
            self._set(*self.observer.range())
        else:
            raise ValueError("fit() of a quantizer without an observer needs the tensor: fit(weight)")

    def freeze(self) -> None:
        """Keep scale and zero point from here on (a learnable scale goes on learning)."""
        self.observing = False

    @property
    def is_fitted(self) -> bool:
        """Whether there is a range to round to; waits for the device."""
        return self.dynamic or bool(self.fitted.item())

    @torch.no_grad()
    def int_values(self, x: Tensor) -> Tensor:
        """Return the integers that stand for `x`."""
        return quantize(x, self.positive_scale(), self.zero_point, self.grid)

    @torch.no_grad()
    def values(self, q: Tensor) -> Tensor:
        """Return the float values that integers stand for."""
        return dequantize(q, self.positive_scale(), self.zero_point, self.grid)

    def resize(self, n: int) -> None:
        """Make room for `n` scales; the parameter stays the same object, and values start anew if `n` differs."""
        if self.scale.numel() == n:
            return
        self.scale.data = self.scale.new_ones(n)
        self.zero_point = self.zero_point.new_full((n,), self.grid.fixed_zero_point or 0)
        self.fitted = torch.zeros_like(self.fitted)
        self._is_empty = True
        if self.observer is not None and self.spec is not None:
            self.observer = self.spec.start(self.grid, n).to(self.scale.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}scale")
        if saved is not None:
            self.resize(saved.numel())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._is_empty = not self.fitted.is_meta and not bool(self.fitted)

    def extra_repr(self) -> str:
        """Return what `print` shows of the quantizer."""
        kind = "dynamic" if self.dynamic else "pact" if self.clip else "lsq" if self.learnable else ""
        return f"{self.grid.to_dict()}{', ' + kind if kind else ''}, enabled={self.enabled}, observing={self.observing}"
