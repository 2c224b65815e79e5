"""Plain loops: what masks add to a step, and what an update of the masks costs, beside torch.nn.utils.prune."""

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from nets import Net, prunable, step
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_opt.pruning.allocation import ERK, LAMP, Allocation, GlobalAllocation
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.selection import select

SPARSITY, BEFORE, AFTER = 0.9, 0.95, 0.96  # an update in the later part of a schedule, as fractions


@dataclass(frozen=True)
class Call:
    """One thing to time.

    Attributes:
        run: What is timed.
        prepare: What comes before, not timed.
        turns: How often a round.
        every: In which rounds; slow calls that no limit holds for come seldom.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    turns: int = 1
    every: int = 1


def steps_of(net: Net) -> dict[str, Call]:
    """Return steps that differ in what masks do; all but torch's are of one and the same model in memory."""
    torch.manual_seed(0)
    model, batch = net.make().train(), net.batch()
    optimizer, parameters = net.optimizer(model.parameters()), prunable(model)
    masks, idle = Masks(parameters), Masks(parameters)
    masks.update(select(_magnitudes(parameters), sparsity=SPARSITY))
    peer = copy.deepcopy(model)
    prune.global_unstructured(layers(peer), pruning_method=prune.L1Unstructured, amount=SPARSITY)
    hooked = net.optimizer(peer.parameters())

    def masked() -> None:
        step(model, optimizer, batch)
        masks.apply()

    def gradients_too() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        masks.mask_gradients()
        optimizer.step()
        masks.apply()

    def without_zeros() -> None:
        step(model, optimizer, batch)
        idle.apply()

    return {
        "step": Call(lambda: step(model, optimizer, batch), turns=2),
        "step, masks": Call(masked, turns=2),
        "step, masks on gradients too": Call(gradients_too),
        "step, nothing masked yet": Call(without_zeros, turns=2),
        "step, torch.nn.utils.prune": Call(lambda: step(peer, hooked, batch)),
        **updates_of(net),
    }


def updates_of(net: Net) -> dict[str, Call]:
    """Return updates: scores, selection, new masks on weights and moments; from one state of a schedule to the next."""
    torch.manual_seed(0)
    model, batch = net.make().train(), net.batch()
    optimizer, parameters = net.optimizer(model.parameters()), prunable(model)
    step(model, optimizer, batch)
    dense = {name: p.detach().clone() for name, p in parameters.items()}
    masks = Masks(parameters)

    def update(allocation: Allocation, fraction: float) -> None:
        scores = _magnitudes(parameters)
        newly = masks.update(select(scores, allocation=allocation, sparsity=SPARSITY, fraction=fraction))
        masks.apply()
        masks.clear_moments([optimizer], newly=newly)

    def go_back(allocation: Allocation) -> None:
        for name, weight in dense.items():
            parameters[name].detach().copy_(weight)
        update(allocation, BEFORE)

    calls = {
        f"update, {type(allocation).__name__}": Call(
            lambda allocation=allocation: update(allocation, AFTER), lambda allocation=allocation: go_back(allocation)
        )
        for allocation in (GlobalAllocation(), ERK(), LAMP())
    }
    peer = copy.deepcopy(model)

    def torch_prune() -> None:
        prune.global_unstructured(layers(peer), pruning_method=prune.L1Unstructured, amount=SPARSITY)

    def undo() -> None:
        for module, name in layers(peer):
            if prune.is_pruned(module):
                prune.remove(module, name)

    return {**calls, "update, torch.nn.utils.prune global": Call(torch_prune, undo, every=4)}


def race(calls: dict[str, Call], *, seconds: float, warmup: int = 1, at_least: int = 5) -> dict[str, list[float]]:
    """Call all in turn, in another order each round; return the thread's CPU seconds by round, a mean of the turns.

    A round in which a call did not come has NaN.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    draw, end, turn = random.Random(0), time.perf_counter() + seconds, -warmup
    while turn < at_least or time.perf_counter() < end:
        order = [name for name, call in calls.items() for _ in range(call.turns) if turn % call.every == 0]
        draw.shuffle(order)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for name in order:
            calls[name].prepare()
            begun = time.thread_time()
            calls[name].run()
            taken[name].append(time.thread_time() - begun)
        if turn >= 0:
            for name, values in taken.items():
                times[name].append(sum(values) / len(values) if values else float("nan"))
        turn += 1
    return times


def layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def _magnitudes(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.detach().abs() for name, p in parameters.items()}
