"""The two parts of the study: one-shot pruning, and smaller nets made from the dense one."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from setting import (
    BATCH,
    CALIBRATION_WINDOWS,
    DENSE_LR,
    DENSE_STEPS,
    DEPTH,
    HIDDEN,
    RETRAIN_LR,
    RETRAIN_STEPS,
    Data,
    Loss,
    cross_entropy,
    net,
    parameters,
    perplexity,
    train,
    windows,
)
from torch import Tensor, nn

from lightning_opt.losses import ForwardKL, Signals, Supervision
from lightning_opt.pruning.criteria import Activation, Criterion, Magnitude, Random, Wanda
from lightning_opt.pruning.depth import drop_by_loss
from lightning_opt.pruning.patterns import NM, Element, Pattern
from lightning_opt.pruning.solvers import SparseGPT, prune_with
from lightning_opt.pruning.statistics import Statistics
from lightning_opt.pruning.structured import shrink
from lightning_opt.surgery import replay

PATTERNS: dict[str, tuple[Pattern, float | None]] = {
    "50 %": (Element(), 0.5),
    "2:4": (NM(2, 4), None),
    "70 %": (Element(), 0.7),
}
METHODS: dict[str, SparseGPT | Criterion] = {
    "random": Random(),
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
}
CALIBRATED = ("wanda", "sparsegpt")
KEPT_LAYERS, KEPT_HIDDEN = 2, 144


def calibration(data: Data, seed: int) -> list[Tensor]:
    """Draw the windows that the dense net is looked at with."""
    inputs, _ = windows(data, CALIBRATION_WINDOWS, torch.Generator().manual_seed(7000 + seed))
    return list(inputs.split(BATCH))


def one_shot(dense: nn.Module, data: Data, *, method: str, pattern: str, calibration_seed: int) -> dict[str, Any]:
    """Prune the linear layers of all blocks at once, without any training, and measure."""
    model = copy.deepcopy(dense)
    kind, sparsity = PATTERNS[pattern]
    masks = prune_with(
        model,
        calibration(data, calibration_seed),
        METHODS[method],
        pattern=kind,
        sparsity=sparsity,
        include=["blocks.*"],
        seed=calibration_seed,
    )
    zeros = sum((~mask).sum().item() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    return {"sparsity": round(zeros, 4), **measured(model, data)}


def measured(model: nn.Module, data: Data) -> dict[str, float]:
    """Return the perplexity on the test part."""
    return {"test": round(perplexity(model, data.test), 4)}


def narrowed(dense: nn.Module, data: Data, seed: int) -> nn.Module:
    """Cut the hidden units that are least active on calibration text, the same number in each block."""
    model, batches = copy.deepcopy(dense).eval(), calibration(data, seed)
    names = [name for name, _ in model.named_parameters() if ".up." in name or ".down." in name]
    statistics = Statistics.of(model, names, Activation())
    with statistics.calibrating(), torch.no_grad():
        for batch in batches:
            model(batch)
    ratio = 1.0 - KEPT_HIDDEN / HIDDEN
    shrink(model, batches[0][:2], ratio, importance=Activation(), kinds=("hidden",), statistics=statistics)
    return model


def shallower(dense: nn.Module, data: Data, seed: int) -> nn.Module:
    """Drop, one after the other, the blocks whose removal costs least on calibration text."""
    inputs, labels = windows(data, CALIBRATION_WINDOWS, torch.Generator().manual_seed(7000 + seed))
    batches = list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), *batch)

    model = copy.deepcopy(dense).eval()
    return replay(model, drop_by_loss(model, batches, loss, drop=DEPTH - KEPT_LAYERS, path="blocks"))


def distilled(dense: nn.Module) -> Loss:
    """Learn from the dense net's distribution alone: word-level forward KL, as the authors do."""
    term = ForwardKL()

    def loss(logits: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            told = dense(inputs)
        return term(Signals(logits=logits), Signals(logits=told), Supervision(labels=labels))

    return loss


# What each arm starts from, what it learns from, steps and highest learning rate.
Start = Callable[[nn.Module, Data, int], nn.Module]


def _scratch(**shape: int) -> Start:
    return lambda dense, data, seed: net(data, 500 + seed, **shape)


_NARROW, _SHALLOW = {"hidden": KEPT_HIDDEN}, {"depth": KEPT_LAYERS}
SMALL: dict[str, tuple[Start, bool, int, float]] = {
    "width, pruned + distilled": (narrowed, True, RETRAIN_STEPS, RETRAIN_LR),
    "width, scratch": (_scratch(**_NARROW), False, RETRAIN_STEPS, DENSE_LR),
    "depth, pruned + distilled": (shallower, True, RETRAIN_STEPS, RETRAIN_LR),
    "depth, scratch": (_scratch(**_SHALLOW), False, RETRAIN_STEPS, DENSE_LR),
    "width, pruned + text": (narrowed, False, RETRAIN_STEPS, RETRAIN_LR),
    "depth, pruned + text": (shallower, False, RETRAIN_STEPS, RETRAIN_LR),
    "width, scratch + distilled": (_scratch(**_NARROW), True, RETRAIN_STEPS, DENSE_LR),
    "width, scratch, long": (_scratch(**_NARROW), False, DENSE_STEPS + RETRAIN_STEPS, DENSE_LR),
    "dense, trained on": (lambda dense, data, seed: copy.deepcopy(dense), False, RETRAIN_STEPS, RETRAIN_LR),
}


ESSENTIAL = tuple(SMALL)[:4]


def smaller(dense: nn.Module, data: Data, *, arm: str, seed: int) -> dict[str, Any]:
    """Make a smaller net, train it, and measure before and after."""
    start, from_dense, steps, lr = SMALL[arm]
    model = start(dense, data, seed)
    before = measured(model, data)["test"]
    loss = distilled(dense.eval()) if from_dense else cross_entropy
    seconds = train(model, data, loss, steps=steps, lr=lr, seed=100 + seed)
    got = {"parameters": parameters(model), "steps": steps, "test_before": before, "cpu_s": round(seconds, 1)}
    return {**got, **measured(model, data)}


def dense_net(data: Data, seed: int) -> tuple[nn.Module, float]:
    """Train the net that everything starts from."""
    model = net(data, seed, hidden=HIDDEN)
    return model, train(model, data, cross_entropy, steps=DENSE_STEPS, lr=DENSE_LR, seed=seed)
