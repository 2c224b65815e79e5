"""Plain loops: what quantizers add to a step: off, observing, rounding, learned; compiled; and what peers add."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
from nets import Net, loss_of
from torch import nn

from lightning_opt.quantization import Scheme, prepare
from lightning_opt.quantization.state import freeze_batch_norm, freeze_observers, set_observing, switch_on


@dataclass(frozen=True)
class Call:
    """One thing to time.

    Attributes:
        run: What is timed.
        turns: How often a round.
    """

    run: Callable[[], object]
    turns: int = 1


def quantizing(net: Net, *, rounding: bool, observing: bool, scheme: str = "w8a8", norms: bool = False) -> nn.Module:
    """Return the network with quantizers that have seen data, and now do what is said."""
    model, batch = net.model(), net.batch()
    prepare(model, batch[0], Scheme.parse(scheme))
    set_observing(model, True)
    model(batch[0])
    set_observing(model, observing)
    if rounding:
        switch_on(model)
        if not observing:
            freeze_observers(model)
    if norms:
        freeze_batch_norm(model)
    return model.train()


def step_of(net: Net, model: nn.Module, call: Callable[..., Any] | None = None) -> Callable[[], None]:
    """Return one training step of a model; `call` is what runs its forward."""
    optimizer, batch = net.optimizer(model.parameters()), net.batch()
    forward = model if call is None else call  # a compiled model has a length, or says that it has none

    def step() -> None:
        optimizer.zero_grad()
        loss_of(forward, batch).backward()
        optimizer.step()

    return step


def steps_of(net: Net) -> dict[str, Call]:
    """Return steps that differ in what quantizers do."""
    models = {
        "fp32": net.model(),
        "quantizers switched off": quantizing(net, rounding=False, observing=False),
        "observing only": quantizing(net, rounding=False, observing=True),
        "rounding and observing": quantizing(net, rounding=True, observing=True),
        "rounding": quantizing(net, rounding=True, observing=False),
        "rounding, norms frozen": quantizing(net, rounding=True, observing=False, norms=True),
        "rounding, learned steps": quantizing(net, rounding=True, observing=False, scheme="w8a8_lsq"),
    }
    often = ("fp32", "rounding", "rounding and observing")
    return {name: Call(step_of(net, model), turns=2 if name in often else 1) for name, model in models.items()}


def peers_of(net: Net) -> dict[str, Call]:
    """Return the step in float and those with the peers' fake quantization."""
    batch = net.batch()
    models = {"fp32": net.model(), "rounding": quantizing(net, rounding=True, observing=False)}
    models["NNCF"] = peers.nncf(net.model(), [batch[0]], bits=8, text=net.text).train()
    models["modelopt"] = peers.modelopt(net.model(), [batch[0]], bits=8).train()
    if net.text:
        models["torchao, dynamic, linear alone"] = peers.torchao_prepare(net.model(), bits=8).train()
    return {name: Call(step_of(net, model)) for name, model in models.items()}


def compiled_of(net: Net) -> dict[str, Call]:
    """Return compiled steps, in float and with quantizers, beside the eager ones."""
    models = {
        "fp32": net.model(),
        "rounding": quantizing(net, rounding=True, observing=False),
        "fp32, compiled": net.model(),
        "rounding, compiled": quantizing(net, rounding=True, observing=False),
        "rounding and observing, compiled": quantizing(net, rounding=True, observing=True),
    }
    calls = {}
    for name, model in models.items():
        compiled = torch.compile(model) if "compiled" in name else None
        step = step_of(net, model, compiled)
        begun = time.perf_counter()
        step()
        print(f"{net.name}, {name}: first step {time.perf_counter() - begun:.1f} s", flush=True)
        calls[name] = Call(step)
    return calls


def race(calls: dict[str, Call], *, seconds: float, warmup: int = 1, at_least: int = 5) -> dict[str, list[float]]:
    """Call all in turn, in another order each round; return the process's CPU seconds by round, a mean of the turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    draw, end, turn = random.Random(0), time.perf_counter() + seconds, -warmup
    while turn < at_least or time.perf_counter() < end:
        order = [name for name, call in calls.items() for _ in range(call.turns)]
        draw.shuffle(order)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for name in order:
            begun = time.process_time()
            calls[name].run()
            taken[name].append(time.process_time() - begun)
        if turn >= 0:
            for name, values in taken.items():
                times[name].append(sum(values) / len(values))
        turn += 1
    return times
