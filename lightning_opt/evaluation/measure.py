"""Named models side by side: what each takes to run, on this machine, in one process, interleaved."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_opt.evaluation.cost import Price, cost_per_million
from lightning_opt.evaluation.energy import EnergyMeter, EnergyUnavailableError, energy_meter, measure_energy
from lightning_opt.evaluation.engines import Engine, build_engines, installed, torch_engine
from lightning_opt.evaluation.flops import count_flops
from lightning_opt.evaluation.inputs import at_batch, to_device
from lightning_opt.evaluation.latency import (
    MIN_CALLS,
    Timings,
    fixed_threads,
    percentile_ms,
    synchronizer,
    time_interleaved,
)
from lightning_opt.evaluation.memory import peak_memory
from lightning_opt.evaluation.parameters import count_nonzero, count_parameters, model_dtype
from lightning_opt.evaluation.size import safetensors_bytes
from lightning_opt.evaluation.state import evaluation_mode, on_device
from lightning_opt.forward import Inputs

Measures = dict[str, Any]
_EAGER = "torch eager"


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
        engines: "torch", "onnxruntime", "openvino", or "auto" for all that are installed; on a device other than the
            CPU only "torch" counts.
        price: What an hour of this machine costs.
        device: Where to measure.

    Returns:
        The record's measures of each model, without its quality. What could not be measured is None, with a reason in
        `reasons`. `engines` lists the same model in the other engines.

    Raises:
        ConfigError: An engine is unknown or not installed.
    """
    names = installed(engines) if torch.device(device).type == "cpu" else ["torch"]
    inputs = to_device(example_inputs, device)
    each = list(models.values())
    with torch.no_grad(), evaluation_mode(*each), on_device(device, *each), fixed_threads(threads) as count:
        built = {name: build_engines(model, inputs, names, threads=count) for name, model in models.items()}
        ready = {name: pair[0] or [torch_engine(models[name])] for name, pair in built.items()}
        timings = {
            batch: _time(ready, at_batch(inputs, batch), rounds=rounds, max_seconds=max_seconds, device=device)
            for batch in batch_sizes
        }
        return {
            name: _measures(model, inputs, ready[name], timings, threads=count, price=price, device=device, name=name)
            | ({"engine_failures": built[name][1]} if built[name][1] else {})
            for name, model in models.items()
        }


def _time(
    ready: Mapping[str, Sequence[Engine]],
    inputs: Inputs,
    *,
    rounds: int,
    max_seconds: float,
    device: torch.device | str,
) -> Timings:
    """Time every engine of every model at one batch size, in rotating order."""
    calls = {}
    for name, engines in ready.items():
        for engine in engines:
            prepared = engine.prepare(inputs)
            calls[_key(name, engine)] = lambda engine=engine, prepared=prepared: engine.run_prepared(prepared)
    on_cpu = torch.device(device).type == "cpu"
    return time_interleaved(
        calls, rounds=rounds, max_seconds=max_seconds, synchronize=None if on_cpu else synchronizer(device)
    )


def _key(name: str, engine: Engine) -> str:
    return f"{name}\n{engine.name}\n{engine.dtype}"


def _measures(
    model: nn.Module,
    inputs: Inputs,
    engines: Sequence[Engine],
    timings: Mapping[int, Timings],
    *,
    threads: int,
    price: Price | None,
    device: torch.device | str,
    name: str,
) -> Measures:
    """Put one model's measures together."""
    eager = next((engine for engine in engines if engine.name == _EAGER), engines[0])
    latency, throughput, reasons = _latency(timings, _key(name, eager))
    result: Measures = {
        "params": count_parameters(model),
        "params_nonzero": count_nonzero(model),
        "flops": None,
        "size_bytes": safetensors_bytes(model),
        "latency_ms": latency,
        "throughput_per_s": throughput,
        "peak_memory_bytes": peak_memory(model, at_batch(inputs, 1)).bytes,
        "energy_j_per_1k": None,
        "cost_per_1m": None,
        "runtime": {"engine": eager.name, "threads": threads, "dtype": model_dtype(model)},
        "reasons": reasons,
    }
    flops = count_flops(model, inputs)
    result["flops"] = flops.total
    if flops.not_counted:
        reasons["flops_not_counted"] = ", ".join(sorted(flops.not_counted))
    _add_energy(result, eager, at_batch(inputs, 1), device)
    _add_cost(result, price)
    if any(timing.noisy(_key(name, eager)) for timing in timings.values()):
        reasons["latency_quality"] = "noisy: the machine was busy while this was timed; repeat it on a quiet one"
    others = [engine for engine in engines if engine is not eager]
    if others:
        result["engines"] = [_engine_entry(engine, timings, name, threads) for engine in others]
    return result


def _latency(timings: Mapping[int, Timings], key: str) -> tuple[list[Measures], list[Measures], dict[str, str]]:
    """Return latency and throughput at each batch size, and why a percentile is missing."""
    latency, throughput, reasons = [], [], {}
    for batch, timing in timings.items():
        samples = timing.samples_ms[key]
        row = {f"p{percent}": percentile_ms(samples, percent) for percent in (50, 95, 99)}
        latency.append({"batch": batch, **row})
        throughput.append({"batch": batch, "value": 1e3 * batch / row["p50"] if row["p50"] else None})
        if None in row.values():
            reasons["latency_ms"] = (
                f"{len(samples)} calls at batch {batch} are too few for a p95 or p99 "
                f"({MIN_CALLS[95]} and {MIN_CALLS[99]}); raise benchmark.max_seconds"
            )
    return latency, throughput, reasons


def _engine_entry(engine: Engine, timings: Mapping[int, Timings], name: str, threads: int) -> Measures:
    latency, throughput, reasons = _latency(timings, _key(name, engine))
    entry: Measures = {
        "engine": engine.name,
        "dtype": engine.dtype,
        "dense": True,
        "threads": threads,
        "latency_ms": latency,
        "throughput_per_s": throughput,
    }
    return entry | ({"reasons": reasons} if reasons else {})


def _add_energy(result: Measures, eager: Engine, inputs: Inputs, device: torch.device | str) -> None:
    try:
        meter: EnergyMeter = energy_meter(device)
    except EnergyUnavailableError as error:
        result["reasons"]["energy_j_per_1k"] = str(error)
        return
    prepared = eager.prepare(inputs)
    energy = measure_energy(lambda: eager.run_prepared(prepared), meter=meter, synchronize=synchronizer(device))
    result["energy_j_per_1k"] = {"value": 1e3 * energy.joules / energy.calls, "source": energy.source}


def _add_cost(result: Measures, price: Price | None) -> None:
    best = max((row["value"] for row in result["throughput_per_s"] if row["value"]), default=None)
    if price is None:
        result["reasons"]["cost_per_1m"] = "no price was given; set benchmark.price_per_hour"
    elif best is None:
        result["reasons"]["cost_per_1m"] = "no throughput was measured"
    else:
        result["cost_per_1m"] = cost_per_million(best, price=price)
