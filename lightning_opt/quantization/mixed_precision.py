"""Choose bits for each layer, or float, so that a model is at most so much worse than it was.

The layers that cost most are given more bits first. How many have to be is found by measuring whole models, never by
adding up what layers cost alone; what turns out not to be needed is taken back.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from lightning_opt.forward import Inputs
from lightning_opt.quantization.calibration import collect
from lightning_opt.quantization.post_training import Improvement, post_training_scheme, quantize
from lightning_opt.quantization.scheme import Scheme
from lightning_opt.quantization.sensitivity import Judge, LayerCost, QuantizedParts, distance_from

FLOAT_BITS = 32


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What was chosen for one layer; a row of the ranked table.

    Attributes:
        name: The layer's full name.
        sensitivity: How much worse the model is with this layer alone quantized as the scheme asks.
        params: Elements of its weight.
        weight_bits: Chosen; None is float.
        activation_bits: Of what it reads; None is float.
        reason: Why it has more bits than the scheme asks for; empty if it has not.
    """

    name: str
    sensitivity: float
    params: int
    weight_bits: int | None
    activation_bits: int | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """A scheme that keeps within a limit, and how it was found.

    Attributes:
        scheme: With a rule for each layer that has other bits.
        rows: All layers, the most sensitive first.
        reference: The metric of the float model.
        value: The metric of the model quantized by `scheme`.
        start: The metric of the model quantized as was asked for, before any layer was given more bits.
        evaluations: How many models were measured.
    """

    scheme: Scheme
    rows: tuple[LayerChoice, ...]
    reference: float
    value: float
    start: float
    evaluations: int

    @property
    def is_float(self) -> bool:
        """Whether no layer can be quantized within the limit."""
        return all(row.weight_bits is None for row in self.rows)

    def table(self) -> list[dict[str, Any]]:
        """Return the rows as plain values."""
        return [asdict(row) for row in self.rows]

    def sensitivities(self) -> dict[str, float]:
        """Return the sensitivity of each layer by its name."""
        return {row.name: row.sensitivity for row in self.rows}


@dataclass(frozen=True)
class _Step:
    """Give one layer more bits.

    Attributes:
        name: The layer.
        to: The bits it then has; None is float.
        gain: How much less it costs then.
        bits: How many bits more its weight then takes.
    """

    name: str
    to: int | None
    gain: float
    bits: int


def mixed_precision(
    model: nn.Module,
    example_inputs: Inputs,
    scheme: Scheme | str = "w8a8",
    *,
    evaluate: Callable[[nn.Module], float],
    max_drop: float,
    calibration: Iterable[Any],
    higher_is_better: bool = True,
    bits: Sequence[int] = (),
    judge: Judge | None = None,
    improve: Sequence[Improvement] = (),
    exclude: Sequence[str] = (),
    max_evaluations: int = 32,
) -> MixedPrecision:
    """Find the scheme with the fewest bits whose model is at most `max_drop` worse than the float model.

    Args:
        model: A trained float model; it stays as it is.
        example_inputs: What `forward` takes.
        scheme: How all layers would be quantized, or its short name.
        evaluate: The metric of a model, on data that are not those of the final test.
        max_drop: How much worse the metric may become, in its own unit: 0.005 is half a point of an accuracy.
        calibration: Batches of inputs.
        higher_is_better: Whether more of the metric is better.
        bits: Bits of weights that may be tried between those of the scheme and float, such as (8,) for "w4a8".
        judge: By what layers are ranked, as in `sensitivity`.
        improve: As in `quantize`; each model that is measured has them.
        exclude: Patterns of module names that stay in float.
        max_evaluations: How many models are measured at most, the float model among them.

    Returns:
        The scheme with the table: also where the scheme that was given keeps within the limit, and stays as it is.

    Raises:
        CalibrationError: There are no calibration data, or they are not finite.
        ValueError: `max_drop` is negative, or the float model's metric is not a number.
    """
    _check(max_drop, max_evaluations)
    batches = collect(calibration, example_inputs)
    scheme = post_training_scheme(scheme).with_rules(dict.fromkeys(exclude))
    sign = 1.0 if higher_is_better else -1.0
    reference = sign * _finite(float(evaluate(model)))

    def measure(candidate: Scheme) -> float:
        made = quantize(model, example_inputs, candidate, calibration=batches, improve=improve, convert=False)
        value = sign * float(evaluate(made))
        return value if not math.isnan(value) else -math.inf

    search = _Search(measure, scheme, dict(model.named_modules()), floor=reference - max_drop, left=max_evaluations - 1)
    ladders = _costs(model, example_inputs, scheme, bits, batches, judge)
    search.run(_steps(ladders))
    return MixedPrecision(
        scheme=search.scheme_of(search.best),
        rows=_rows(ladders, search.best),
        reference=sign * reference,
        value=sign * search.value_of(search.best, known=reference),
        start=sign * search.value_of(()),
        evaluations=max_evaluations - search.left,
    )


def _finite(metric: float) -> float:
    if not math.isfinite(metric):
        raise ValueError(f"evaluate(model) of the float model is {metric}; there is nothing to keep to")
    return metric


def _check(max_drop: float, max_evaluations: int) -> None:
    if not max_drop >= 0 or not math.isfinite(max_drop):
        raise ValueError(f"max_drop must be a number, 0 or more, not {max_drop}")
    if max_evaluations < 3:
        raise ValueError(f"max_evaluations must be at least 3, not {max_evaluations}")


def _costs(
    model: nn.Module,
    example_inputs: Inputs,
    scheme: Scheme,
    bits: Sequence[int],
    batches: Sequence[Inputs],
    judge: Judge | None,
) -> list[dict[str, LayerCost]]:
    """Return what each layer costs alone: with the bits of the scheme, then with each larger number of `bits`."""
    judge = judge or distance_from(model, batches)
    least = min((grid.bits for grid in (scheme.weight, scheme.embedding) if grid is not None), default=8)
    found = []
    for count in (None, *sorted({count for count in bits if count > least})):
        asked = scheme if count is None else _with_bits(scheme, count)
        parts = QuantizedParts(model, example_inputs, asked, batches=batches)
        costs = {}
        for name in parts.layers:
            with parts.only([name]):
                costs[name] = parts.cost(name, judge(parts.model))
        found.append(costs)
    return found


def _with_bits(scheme: Scheme, bits: int) -> Scheme:
    """Return the scheme with at least so many bits for every weight."""

    def wider(grid: Any) -> Any:
        return grid if grid is None or grid.bits >= bits else replace(grid, bits=bits)

    return replace(scheme, weight=wider(scheme.weight), embedding=wider(scheme.embedding))


def _steps(ladders: Sequence[Mapping[str, LayerCost]]) -> list[_Step]:
    """Return what can be done for each layer, in the order of gain for each bit that the model grows by.

    The steps of one layer stay in their order.
    """
    steps = [step for name in ladders[0] for step in _ladder(name, [costs[name] for costs in ladders])]
    return sorted(steps, key=lambda step: -step.gain / max(step.bits, 1))


def _ladder(name: str, costs: Sequence[LayerCost]) -> Iterator[_Step]:
    """Yield the steps of one layer, each no better worth than the one before it: others are one step together."""
    known = [(cost.weight_bits or FLOAT_BITS, max(cost.cost, 0.0)) for cost in costs]
    ends = [pair for place, pair in enumerate(known) if place == 0 or pair[0] > known[place - 1][0]] + [
        (FLOAT_BITS, 0.0)
    ]
    params = max(costs[0].params, 1)
    at = 0
    while at < len(ends) - 1:
        rates = [(ends[at][1] - end[1]) / max(end[0] - ends[at][0], 1) for end in ends[at + 1 :]]
        to = at + 1 + rates.index(max(rates))
        width, cost = ends[to]
        bits = (width - ends[at][0]) * params
        yield _Step(name, None if width == FLOAT_BITS else width, ends[at][1] - cost, bits)
        at = to


class _Search:
    """Finds how many of the steps, in their order, keep the metric above `floor`; then takes back what it can."""

    def __init__(
        self,
        measure: Callable[[Scheme], float],
        scheme: Scheme,
        modules: Mapping[str, nn.Module],
        *,
        floor: float,
        left: int,
    ) -> None:
        self.measure, self.scheme, self.modules, self.floor, self.left = measure, scheme, modules, floor, left
        self.best: tuple[_Step, ...] = ()
        self._known: dict[tuple[_Step, ...], float] = {}

    def run(self, steps: Sequence[_Step]) -> None:
        if self.value_of(()) >= self.floor:
            return
        # All steps together are the float model, which keeps within any limit and need not be measured.
        fails, holds = 0, len(steps)
        while holds - fails > 1 and self.left > 0:
            middle = (fails + holds) // 2
            if self.value_of(tuple(steps[:middle])) >= self.floor:
                holds = middle
            else:
                fails = middle
        self.best = tuple(steps[:holds])
        for step in sorted(self.best, key=lambda step: -step.bits):
            if self.left <= 0:
                return
            without = tuple(other for other in self.best if other is not step)
            if len(without) != fails or without != tuple(steps[:fails]):
                self._take_back(without)

    def _take_back(self, without: tuple[_Step, ...]) -> None:
        if self.value_of(without) >= self.floor:
            self.best = without

    def value_of(self, chosen: tuple[_Step, ...], *, known: float | None = None) -> float:
        """Return the metric with these steps done; `known` where it has not been and cannot be measured."""
        if chosen not in self._known:
            if self.left <= 0:
                return -math.inf if known is None else known
            self.left -= 1
            self._known[chosen] = self.measure(self.scheme_of(chosen))
        return self._known[chosen]

    def scheme_of(self, chosen: Iterable[_Step]) -> Scheme:
        return self.scheme.with_rules({name: self._rule(name, bits) for name, bits in _last(chosen).items()})

    def _rule(self, name: str, bits: int | None) -> dict[str, Any] | None:
        if bits is None:
            return None
        is_table = isinstance(self.modules[name], nn.Embedding | nn.EmbeddingBag)
        return {"embedding" if is_table else "weight": {"bits": bits}}


def _last(chosen: Iterable[_Step]) -> dict[str, int | None]:
    """Return the bits that each layer ends up with."""
    found: dict[str, int | None] = {}
    for step in chosen:
        if _width(step.to) > _width(found.get(step.name, 0)):
            found[step.name] = step.to
    return found


def _width(bits: int | None) -> int:
    return FLOAT_BITS if bits is None else bits


def _rows(ladders: Sequence[Mapping[str, LayerCost]], chosen: Iterable[_Step]) -> tuple[LayerChoice, ...]:
    given = _last(chosen)
    rows = []
    for name, cost in ladders[0].items():
        is_changed = name in given
        bits = given[name] if is_changed else cost.weight_bits
        rows.append(
            LayerChoice(
                name=name,
                sensitivity=cost.cost,
                params=cost.params,
                weight_bits=bits,
                activation_bits=None if bits is None else cost.activation_bits,
                reason=f"{'float' if bits is None else f'{bits} bits'} to keep within the limit" if is_changed else "",
            )
        )
    return tuple(sorted(rows, key=lambda row: (-row.sensitivity, row.name)))
