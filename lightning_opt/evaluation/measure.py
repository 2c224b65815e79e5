"""Named models side by side: what each takes to run, on this machine, in one process, interleaved."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.evaluation.cost import Price, cost_per_million
from lightning_opt.evaluation.energy import EnergyMeter, EnergyUnavailableError, energy_meter, measure_energy
from lightning_opt.evaluation.engines import build_runners, chosen_engines
from lightning_opt.evaluation.flops import count_flops
from lightning_opt.evaluation.inputs import at_batch, to_device
from lightning_opt.evaluation.latency import (
    MIN_CALLS,
    Timings,
    fixed_threads,
    latency_row,
    synchronizer,
    time_interleaved,
)
from lightning_opt.evaluation.memory import peak_memory
from lightning_opt.evaluation.parameters import count_nonzero, count_parameters, model_dtype
from lightning_opt.evaluation.size import safetensors_bytes
from lightning_opt.evaluation.state import evaluation_mode, on_device
from lightning_opt.export.precision import FLOATS, precision_of
from lightning_opt.export.runner import EagerRunner, Runner
from lightning_opt.forward import Inputs

Measures = dict[str, Any]
Judge = Callable[[Callable[[Inputs], Tensor]], Mapping[str, float]]
_FILE = "file\n"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured side by side.

    Attributes:
        models: The record's measures of each model, without its quality.
        runners: `latency_ms`, `throughput_per_s` and `reasons` of each runner that was timed beside the models.
    """

    models: dict[str, Measures]
    runners: dict[str, Measures] = field(default_factory=dict)


def measure(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int | None = 1,
    rounds: int = 300,
    max_seconds: float = 10.0,
    engines: Sequence[str] | str = ("torch",),
    price: Price | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Measures]:
    """Measure models on the same inputs, each call of one beside a call of every other.

    Args:
        models: By name; each is measured in eval mode and handed back in the mode it came in.
        example_inputs: One sample or more; repeated to each batch size.
        batch_sizes: At which latency and throughput are taken.
        threads: CPU threads of every engine; None keeps PyTorch's number.
        rounds: Most calls of each at each batch size.
        max_seconds: Time for each batch size, all models and engines together.
        engines: "torch", "onnxruntime", "openvino", also "NAME:bfloat16", or "auto" for all that are there; on a
            device other than the CPU only "torch" counts.
        price: What an hour of this machine costs.
        device: Where to measure.

    Returns:
        The record's measures of each model, without its quality. What could not be measured is None, with a reason in
        `reasons`. `engines` lists the same model in the other engines.

    Raises:
        ConfigError: An engine is unknown or not installed.
    """
    return measure_beside(
        models,
        example_inputs,
        runners={},
        batch_sizes=batch_sizes,
        threads=threads,
        rounds=rounds,
        max_seconds=max_seconds,
        engines=engines,
        price=price,
        device=device,
    ).models


def measure_beside(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    *,
    runners: Mapping[str, Runner],
    only_eager: Collection[str] = (),
    judge: Judge | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int | None = 1,
    rounds: int = 300,
    max_seconds: float = 10.0,
    engines: Sequence[str] | str = ("torch",),
    price: Price | None = None,
    device: torch.device | str = "cpu",
) -> Measured:
    """Measure models as `measure` does, with files in their engines between their calls.

    Args:
        models: As of `measure`.
        example_inputs: As of `measure`.
        runners: What runs each file, on the CPU, by a name of its own; with `threads` threads.
        only_eager: Names of models that are timed in PyTorch eager alone: their files stand for them elsewhere.
        judge: Takes what answers inputs and returns its quality; asked of each engine that rounds to bfloat16.
        batch_sizes: As of `measure`, as all that follow.
        threads: CPU threads of every engine.
        rounds: Most calls of each at each batch size.
        max_seconds: Time for each batch size.
        engines: Of the models that are not in `only_eager`.
        price: What an hour of this machine costs.
        device: Where the models are measured.

    Raises:
        ConfigError: An engine is unknown or not installed.
    """
    names = chosen_engines(engines) if torch.device(device).type == "cpu" else ["torch"]
    engines_of = {name: ["torch"] if name in only_eager else names for name in models}
    inputs = to_device(example_inputs, device)
    each = list(models.values())
    with ExitStack() as stack:
        for context in (torch.no_grad(), evaluation_mode(*each), on_device(device, *each)):
            stack.enter_context(context)
        count = stack.enter_context(fixed_threads(threads))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = [
            _Bench(name, model, inputs, engines_of[name], threads=count, folder=folder / str(place))
            for place, (name, model) in enumerate(models.items())
        ]
        timings = {
            batch: _time(bench, runners, at_batch(inputs, batch), rounds=rounds, max_seconds=max_seconds, device=device)
            for batch in batch_sizes
        }
        return Measured(
            models={one.name: one.measures(timings, price=price, device=device, judge=judge) for one in bench},
            runners={name: _timed(timings, _FILE + name) for name in runners},
        )


class _Bench:
    """One model in its engines."""

    def __init__(
        self, name: str, model: nn.Module, inputs: Inputs, engines: Sequence[str], *, threads: int, folder: Path
    ) -> None:
        folder.mkdir()
        self.name, self.model, self.inputs, self.threads = name, model, inputs, threads
        # PyTorch eager is always measured: it is what the top-level numbers mean.
        self.precision = precision_of(model)
        others = [
            engine for engine in engines if engine != "torch" and (self.dense or not engine.endswith(":bfloat16"))
        ]
        self.eager = EagerRunner(model)
        self.others, self.failures = build_runners(model, inputs, others, threads=threads, folder=folder)

    @property
    def dense(self) -> bool:
        """Whether its weights are floats."""
        return self.precision in FLOATS

    def runners(self) -> Iterator[tuple[str, Runner]]:
        """Yield each engine under a key that no other model's engine has."""
        for runner in (self.eager, *self.others):
            yield self.key(runner), runner

    def key(self, runner: Runner) -> str:
        """Return the key of an engine in the timings."""
        return f"{self.name}\n{runner.engine}\n{runner.dtype}"

    def measures(
        self,
        timings: Mapping[int, Timings],
        *,
        price: Price | None,
        device: torch.device | str,
        judge: Judge | None = None,
    ) -> Measures:
        """Put the model's measures together."""
        key = self.key(self.eager)
        latency, throughput, reasons = _latency(timings, key)
        flops = count_flops(self.model, self.inputs)
        result: Measures = {
            "params": count_parameters(self.model),
            "params_nonzero": count_nonzero(self.model),
            "flops": flops.total,
            "size_bytes": safetensors_bytes(self.model),
            "latency_ms": latency,
            "throughput_per_s": throughput,
            "peak_memory_bytes": peak_memory(self.model, at_batch(self.inputs, 1)).bytes,
            "energy_j_per_1k": None,
            "cost_per_1m": None,
            "runtime": {"engine": self.eager.engine, "threads": self.threads, "dtype": model_dtype(self.model)},
            "reasons": reasons,
        }
        if flops.not_counted:
            reasons["flops_not_counted"] = ", ".join(sorted(flops.not_counted))
        reasons |= _noise(timings, key)
        _add_energy(result, self.eager.bind(at_batch(self.inputs, 1)), device)
        _add_cost(result, price)
        if self.others:
            result["engines"] = [self._entry(runner, timings, judge) for runner in self.others]
        return result | ({"engine_failures": self.failures} if self.failures else {})

    def _entry(self, runner: Runner, timings: Mapping[int, Timings], judge: Judge | None) -> Measures:
        latency, throughput, reasons = _latency(timings, self.key(runner))
        dtype = runner.dtype if self.dense else self.precision
        entry: Measures = {"engine": runner.engine, "dtype": dtype, "dense": self.dense, "threads": self.threads}
        entry |= {"latency_ms": latency, "throughput_per_s": throughput}
        if judge is not None and runner.dtype == "bfloat16":
            entry["quality"] = dict(judge(runner.predict))
        return entry | ({"reasons": reasons} if reasons else {})


def _time(
    bench: Iterable[_Bench],
    runners: Mapping[str, Runner],
    inputs: Inputs,
    *,
    rounds: int,
    max_seconds: float,
    device: torch.device | str,
) -> Timings:
    """Time every engine of every model, and every file, at one batch size, in rotating order."""
    calls = {key: runner.bind(inputs) for one in bench for key, runner in one.runners()}
    on_cpu = torch.device(device).type == "cpu"
    if runners:
        there = to_device(inputs, "cpu")
        calls |= {_FILE + name: runner.bind(there) for name, runner in runners.items()}
    return time_interleaved(
        calls, rounds=rounds, max_seconds=max_seconds, synchronize=None if on_cpu else synchronizer(device)
    )


def _timed(timings: Mapping[int, Timings], key: str) -> Measures:
    """Return what was timed of one file."""
    latency, throughput, reasons = _latency(timings, key)
    return {"latency_ms": latency, "throughput_per_s": throughput, "reasons": reasons | _noise(timings, key)}


def _noise(timings: Mapping[int, Timings], key: str) -> dict[str, str]:
    if not any(timing.noisy(key) for timing in timings.values()):
        return {}
    return {"latency_quality": "noisy: the machine was busy while this was timed; repeat it on a quiet one"}


def _latency(timings: Mapping[int, Timings], key: str) -> tuple[list[Measures], list[Measures], dict[str, str]]:
    """Return latency and throughput at each batch size, and why a percentile is missing."""
    latency, throughput, reasons = [], [], {}
    for batch, timing in timings.items():
        samples = timing.samples_ms[key]
        row = latency_row(samples, batch=batch)
        latency.append(row)
        throughput.append({"batch": batch, "value": 1e3 * batch / row["p50"] if row["p50"] else None})
        if None in row.values():
            reasons["latency_ms"] = (
                f"{len(samples)} calls at batch {batch} are too few for a p95 or p99 "
                f"({MIN_CALLS[95]} and {MIN_CALLS[99]}); raise benchmark.max_seconds"
            )
    return latency, throughput, reasons


def _add_energy(result: Measures, call: Callable[[], Any], device: torch.device | str) -> None:
    try:
        meter: EnergyMeter = energy_meter(device)
    except EnergyUnavailableError as error:
        result["reasons"]["energy_j_per_1k"] = str(error)
        return
    energy = measure_energy(call, meter=meter, synchronize=synchronizer(device))
    result["energy_j_per_1k"] = {"value": 1e3 * energy.joules / energy.calls, "source": energy.source}


def _add_cost(result: Measures, price: Price | None) -> None:
    best = max((row["value"] for row in result["throughput_per_s"] if row["value"]), default=None)
    if price is None:
        result["reasons"]["cost_per_1m"] = "no price was given; set benchmark.price_per_hour"
    elif best is None:
        result["reasons"]["cost_per_1m"] = "no throughput was measured"
    else:
        result["cost_per_1m"] = cost_per_million(best, price=price)
