"""What a quantizer is asked for, checked as far as it can be without a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_opt.quantization.improvement import FloatImprovement, QuantizedImprovement
from lightning_opt.quantization.post_training import post_training_scheme
from lightning_opt.quantization.scheme import Scheme

Method = Literal["qat", "post_training"]
Improvement = FloatImprovement | QuantizedImprovement


@dataclass(frozen=True, kw_only=True)
class What:
    """What is quantized, and by which rules; the fields are arguments of `Quantize`.

    Attributes:
        name: How the user named the scheme.
        scheme: The scheme itself.
    """

    name: str
    scheme: Scheme
    method: Method
    calibration_samples: int
    improve: tuple[Improvement, ...]
    max_drop: float | None
    exclude: tuple[str, ...]

    @classmethod
    def read(
        cls,
        scheme: Scheme | str,
        *,
        method: Any,
        calibration_samples: Any,
        improve: Sequence[Improvement],
        max_drop: Any,
        exclude: Sequence[str],
    ) -> "What":
        """Check the arguments of `Quantize`.

        Raises:
            ValueError: One is out of range, or two do not go together; the message names it.
        """
        if method not in get_args(Method):
            raise ValueError(f"method={method!r}: give 'qat' or 'post_training'")
        if isinstance(calibration_samples, bool) or not isinstance(calibration_samples, int) or calibration_samples < 1:
            raise ValueError(f"calibration_samples={calibration_samples!r}: give a number of 1 or more")
        if isinstance(exclude, str) or not all(isinstance(one, str) for one in exclude):
            raise ValueError(f"exclude={exclude!r}: give a list of names, such as ['head']")
        _check_after(method, improve, max_drop)
        read = _read_scheme(scheme, method)
        return cls(
            name=scheme if isinstance(scheme, str) else describe(read),
            scheme=read,
            method=method,
            calibration_samples=calibration_samples,
            improve=tuple(improve),
            max_drop=None if max_drop is None else float(max_drop),
            exclude=tuple(exclude),
        )

    @property
    def trains(self) -> bool:
        """Whether the model is trained with rounded values."""
        return self.method == "qat"

    def __str__(self) -> str:
        improved = [type(one).__name__ for one in self.improve]
        limit = [] if self.max_drop is None else [f"at most {self.max_drop:g} worse"]
        return ", ".join([self.name, *improved, *limit])


def _read_scheme(scheme: Any, method: Method) -> Scheme:
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise ValueError(f"scheme={scheme!r}: give a Scheme, or a short name such as 'w8a8'")
    try:
        return Scheme.parse(scheme) if method == "qat" else post_training_scheme(scheme)
    except ValueError as error:
        raise ValueError(f"scheme={scheme!r}: {error}") from error


def _check_after(method: Method, improve: Any, max_drop: Any) -> None:
    if isinstance(improve, str) or not all(isinstance(one, Improvement) for one in improve):
        raise ValueError(f"improve={improve!r}: give a list of improvements, such as [SmoothQuant()]")
    if max_drop is not None and (
        isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0.0 <= max_drop < math.inf
    ):
        raise ValueError(f"max_drop={max_drop!r}: give how much worse the metric may become, 0 or more")
    for name, value in (("improve", improve), ("max_drop", max_drop)):
        if method == "qat" and value not in ((), [], None):
            raise ValueError(f"{name}={value!r} goes with method='post_training' only; training itself makes up for it")


def describe(scheme: Scheme) -> str:
    """Return the bits of a scheme in a few letters, such as "w4a8"."""
    weight = "" if scheme.weight is None else f"w{scheme.weight.bits}"
    group = f"g{scheme.weight.group_size}" if scheme.weight is not None and scheme.weight.group_size else ""
    activation = "" if scheme.activation is None else f"a{scheme.activation.bits}"
    ending = "_dynamic" if scheme.dynamic else "_pact" if scheme.clip else "_lsq" if scheme.learnable else ""
    return f"{weight}{group}{activation}{ending}"
