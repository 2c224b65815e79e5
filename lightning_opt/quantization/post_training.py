"""Quantize a trained model without training it."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from lightning_opt.forward import Inputs
from lightning_opt.quantization.calibration import CalibrationError, calibrate, check_finite, collect
from lightning_opt.quantization.convert import convert as to_integers
from lightning_opt.quantization.improvement import FloatImprovement, Outcome, QuantizedImprovement
from lightning_opt.quantization.observers import MinMax
from lightning_opt.quantization.prepare import Prepared, prepare
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.state import freeze_observers, is_quantized, switch_on

Improvement: TypeAlias = FloatImprovement | QuantizedImprovement


@dataclass(frozen=True, kw_only=True)
class PostTraining:
    """What `quantize_in_place` did.

    Attributes:
        prepared: Where quantizers were inserted, and which layers stay in float and why.
        samples: How many samples the ranges of activations were found from; 0 where none are needed.
        outcomes: What each improvement did, in their order.
    """

    prepared: Prepared
    samples: int
    outcomes: tuple[Outcome, ...]


def quantize(
    model: nn.Module,
    example_inputs: Inputs,
    scheme: Scheme | str = "w8a8",
    *,
    calibration: Iterable[Any] | None = None,
    calibration_samples: int | None = None,
    improve: Sequence[Improvement] = (),
    exclude: Sequence[str] = (),
    max_drop: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    higher_is_better: bool = True,
    convert: bool = True,
) -> nn.Module:
    """Return a quantized copy of a trained model.

    Args:
        model: A trained model; it stays as it is.
        example_inputs: What `forward` takes.
        scheme: A `Scheme` or its short name: "w8a8" (static), "w8a8_dynamic", "w4g32" (weights only). With a short name
            ranges of activations are their smallest and largest values.
        calibration: Batches, such as a data loader, to find ranges from: a few hundred samples of what the model will
            see. Dynamic and weight-only schemes need none, improvements do.
        calibration_samples: How many samples to take; None: all.
        improve: Objects such as `SmoothQuant()` or `GPTQ()`. Those of the float model come first, then those that
            round, each in the order given.
        exclude: Patterns (`fnmatch`) of full names of layers that stay in float.
        max_drop: How much worse the metric may be, in its own unit: layers get more bits, or stay in float, until that
            is kept; `mixed_precision` also returns the table.
        evaluate: With `max_drop`: the metric of a model, on data that are not those of the final test.
        higher_is_better: Whether more of the metric is better.
        convert: Put integers in place of weights. False: float weights that are rounded while the model computes.

    Returns:
        The copy, in evaluation mode.

    Raises:
        CalibrationError: Calibration data are needed and missing, too few or not finite, or the model answers with NaN.
        ConfigError: An improvement finds nothing to improve.
        ValueError: The scheme is not known, the model is quantized already, or `max_drop` comes without `evaluate`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> small = quantize(net, x[:1], "w8a8", calibration=x.split(16))
        >>> small.state_dict()["0.weight"].dtype, tuple(small(x).shape)
        (torch.int8, (64, 3))
    """
    batches = [] if calibration is None else collect(calibration, example_inputs, limit=calibration_samples)
    given: dict[str, Any] = {"improve": improve, "exclude": exclude}
    if max_drop is not None or evaluate is not None:
        limit: dict[str, Any] = {"max_drop": max_drop, "evaluate": evaluate, "higher_is_better": higher_is_better}
        scheme = _kept_within(model, example_inputs, scheme, calibration=batches, **limit, **given)
    quantized = copy.deepcopy(model).eval()
    quantize_in_place(quantized, example_inputs, scheme, batches=batches, **given)
    return to_integers(quantized) if convert else quantized


def quantize_in_place(
    model: nn.Module,
    example_inputs: Inputs,
    scheme: Scheme | str = "w8a8",
    *,
    batches: Sequence[Inputs] = (),
    improve: Sequence[Improvement] = (),
    exclude: Sequence[str] = (),
) -> PostTraining:
    """Insert quantizers into `model`, find their ranges, improve weights, and fix everything; weights stay float.

    Args:
        model: A trained float model; changed in place, its recipe too. After an error it may be changed in part.
        example_inputs: As in `quantize`.
        scheme: As in `quantize`.
        batches: Calibration data, as `calibration.collect` gives them.
        improve: As in `quantize`.
        exclude: As in `quantize`.

    Raises:
        CalibrationError: As in `quantize`.
        ConfigError: As in `quantize`.
        ValueError: As in `quantize`.
    """
    scheme = post_training_scheme(scheme)
    _check(model, scheme, batches, improve)
    outcomes = [one.improve(model, batches) for one in improve if isinstance(one, FloatImprovement)]
    prepared = prepare(model, example_inputs, scheme, exclude=exclude)
    samples = calibrate(model, batches) if scheme.needs_calibration else 0
    later = [one for one in improve if isinstance(one, QuantizedImprovement)]
    reference = copy.deepcopy(model) if later else model
    switch_on(model)
    outcomes += [one.improve(model, batches, reference=reference) for one in later]
    freeze_observers(model)
    return PostTraining(prepared=prepared, samples=samples, outcomes=tuple(outcomes))


def _kept_within(
    model: nn.Module,
    example_inputs: Inputs,
    scheme: Scheme | str,
    *,
    max_drop: float | None,
    evaluate: Callable[[nn.Module], float] | None,
    **arguments: Any,
) -> Scheme:
    """Return the scheme with more bits for the layers that need them."""
    from lightning_opt.quantization.mixed_precision import mixed_precision  # it calls `quantize` in its turn

    if max_drop is None or evaluate is None:
        raise ValueError("max_drop and evaluate go together: the limit, and a function that returns a model's metric")
    return mixed_precision(model, example_inputs, scheme, max_drop=max_drop, evaluate=evaluate, **arguments).scheme


def post_training_scheme(scheme: Scheme | str) -> Scheme:
    """Return a scheme; a short name gets an observer of activations that sees all calibration data alike.

    Raises:
        ValueError: The name is not known.
    """
    if isinstance(scheme, Scheme):
        return scheme
    return dataclasses.replace(Scheme.parse(scheme), activation_observer=MinMax())


def _check(model: nn.Module, scheme: Scheme, batches: Sequence[Inputs], improve: Sequence[Improvement]) -> None:
    if is_quantized(model):
        raise ValueError(f"{type(model).__name__} is quantized already; quantize the float model")
    for one in improve:
        if not isinstance(one, FloatImprovement | QuantizedImprovement):
            raise ValueError(f"improve has {one!r:.80}; give objects such as SmoothQuant() or GPTQ()")
    for number, batch in enumerate(batches):
        check_finite(batch, what=f"calibration batch {number}")
    if batches:
        return
    if improve:
        raise CalibrationError(f"{type(improve[0]).__name__} needs calibration data: calibration=batches of inputs")
    if scheme.needs_calibration:
        raise CalibrationError(
            "a static scheme needs calibration=batches, a few hundred samples in all; or choose a dynamic one"
        )
