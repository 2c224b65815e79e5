"""Show a model some data, so that its quantizers find the ranges of its activations."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.state import evaluation_mode
from lightning_opt.forward import Inputs, batch_size_of, forward, map_inputs
from lightning_opt.quantization.quantizer import FakeQuantizer, calibrating
from lightning_opt.quantization.state import quantizers


class CalibrationError(ConfigError):
    """Calibration data that cannot be used: too few, not finite, or not what the model wants (exit 2)."""


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Inputs], *, limit: int | None = None) -> int:
    """Run batches through a prepared model in evaluation mode and fit the ranges of its activations to them alone.

    Dynamic ranges, and learned ones that have begun to learn, stay as they are. The same batches give the same ranges,
    bit for bit.

    Args:
        model: A prepared model, switched on or off; only its quantizers change, and its modes are given back.
        batches: Inputs, one batch after the other; no labels.
        limit: How many samples to use, so that the last batch may be cut; None: all that there are.

    Returns:
        The number of samples.

    Raises:
        CalibrationError: There are no batches or fewer samples than `limit`, or inputs or answers are not finite. The
            model is then as it was.
    """
    watching = {name: quantizer for name, quantizer in quantizers(model).items() if _is_calibrated(quantizer)}
    samples = 0
    with _fresh(watching.values()):
        with evaluation_mode(model), calibrating():
            for number, batch in enumerate(limited(batches, limit)):
                samples += batch_size_of(batch)
                check_finite(batch, what=f"calibration batch {number}")
                _check_answer(forward(model, batch), number)
        _check_enough(samples, limit)
        for name, quantizer in watching.items():
            _fit(name, quantizer)
    return samples


def limited(batches: Iterable[Inputs], limit: int | None) -> Iterator[Inputs]:
    """Yield batches until there are `limit` samples, and no batch more is drawn; the last one is cut to fit.

    Raises:
        ValueError: `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 sample, not {limit}")
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        size = min(batch_size_of(batch), left)
        yield batch if size == batch_size_of(batch) else map_inputs(batch, lambda tensor, size=size: tensor[:size])
        left -= size
        if not left:
            return


def collect(batches: Iterable[Any], example_inputs: Inputs, *, limit: int | None = None) -> list[Inputs]:
    """Draw calibration batches into a list, each in the form of `example_inputs`.

    Batches of a data loader may carry more than inputs: of `(x, y)` the first is taken where the example is a tensor,
    of a dict the names that the example has.

    Raises:
        CalibrationError: There are no batches or fewer samples than `limit`, a batch lacks what the example has, or
            values are not finite.
    """
    found = list(limited((in_form_of(example_inputs, batch) for batch in batches), limit))
    _check_enough(sum(map(batch_size_of, found)), limit)
    for number, batch in enumerate(found):
        check_finite(batch, what=f"calibration batch {number}")
    return found


def in_form_of(example_inputs: Inputs, batch: Any) -> Inputs:
    """Return the inputs in a batch: a tensor, a tuple or a dict like the example's.

    Raises:
        CalibrationError: The batch lacks what the example has.
    """
    if isinstance(example_inputs, Mapping):
        missing = [name for name in example_inputs if not isinstance(batch, Mapping) or name not in batch]
        if missing:
            raise CalibrationError(f"a calibration batch lacks {missing[0]!r}, which example_inputs has")
        return {name: batch[name] for name in example_inputs}
    wanted = 1 if isinstance(example_inputs, Tensor) else len(example_inputs)
    found = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(found, tuple | list) or len(found) < wanted:
        kind = type(batch).__name__
        raise CalibrationError(f"a calibration batch is a {kind}; example_inputs has {wanted} tensor(s), give as many")
    return found[0] if isinstance(example_inputs, Tensor) else tuple(found[:wanted])


def check_finite(values: Any, *, what: str) -> None:
    """Look for NaN and infinities in tensors, also within tuples and dicts.

    Raises:
        CalibrationError: There are some.
    """
    if isinstance(values, Tensor):
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise CalibrationError(f"{what} holds NaN or infinite values; nothing was quantized, look at the data")
        return
    inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple | list) else ()
    for value in inner:
        check_finite(value, what=what)


def _is_calibrated(quantizer: FakeQuantizer) -> bool:
    """Return whether a range is that of an activation, and found by looking."""
    return quantizer.observer is not None and not (quantizer.learnable and quantizer.is_fitted)


@contextmanager
def _fresh(watching: Iterable[FakeQuantizer]) -> Iterator[None]:
    """Let quantizers observe from the start, inside; if anything goes wrong they are what they were."""
    held = [(quantizer, quantizer.observing, quantizer.observer, _ranges(quantizer)) for quantizer in watching]
    for quantizer, *_ in held:
        quantizer.observing = True
        if quantizer.spec is not None:
            quantizer.observer = quantizer.spec.start(quantizer.grid, quantizer.scale.numel()).to(
                quantizer.scale.device
            )
    try:
        yield
    except BaseException:
        for quantizer, _, observer, ranges in held:
            quantizer.observer = observer
            for own, value in zip(_ranges(quantizer, copy=False), ranges, strict=True):
                own.copy_(value)
        raise
    finally:
        for quantizer, observing, *_ in held:
            quantizer.observing = observing


def _ranges(quantizer: FakeQuantizer, *, copy: bool = True) -> list[Tensor]:
    values = [quantizer.scale.detach(), quantizer.zero_point, quantizer.fitted]
    return [value.clone() for value in values] if copy else values


def _check_answer(answer: Any, number: int) -> None:
    """Refuse NaN; an infinite answer may be meant, as the logit of a class that is masked."""
    if isinstance(answer, Tensor):
        if bool(torch.isnan(answer).any()):
            raise CalibrationError(f"the model answers calibration batch {number} with NaN; nothing was quantized")
        return
    inner = answer.values() if isinstance(answer, Mapping) else answer if isinstance(answer, tuple | list) else ()
    for value in inner:
        _check_answer(value, number)


def _check_enough(samples: int, limit: int | None) -> None:
    if samples == 0:
        raise CalibrationError("calibration has no samples; give batches of inputs, a few hundred samples in all")
    if limit is not None and samples < limit:
        raise CalibrationError(f"calibration has {samples} samples, {limit} were asked for; give more or ask for fewer")


def _fit(name: str, quantizer: FakeQuantizer) -> None:
    quantizer.fit()
    if not bool(torch.isfinite(quantizer.scale).all()):
        raise CalibrationError(
            f"values at {name} are not finite in calibration; look at the data, or exclude the layer"
        )
