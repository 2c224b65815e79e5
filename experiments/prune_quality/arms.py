"""The arms: what is done to the net, in how many steps. All of a pair take the same number of optimizer steps."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelPruning
from setting import PAIRS, Data, Pair, Teacher, fresh, parameters, sparsity, train, weights_of
from torch import nn
from torch.nn.utils import prune as torch_prune

from lightning_opt.callbacks import Prune
from lightning_opt.evaluation.flops import count_flops
from lightning_opt.models.initialization import init_convolutions
from lightning_opt.pruning import (
    ERK,
    LAMP,
    Allocation,
    Cubic,
    FirstOrder,
    GlobalAllocation,
    GroupNorm,
    Magnitude,
    OneShot,
    Random,
    Structures,
    shrink,
)

UNITS, ROUND_TO = ("channels", "hidden"), 4  # what structured pruning removes, to which widths
ALLOCATIONS: dict[str, Allocation] = {
    "erk": ERK(),
    "lamp": LAMP(),
    "global": GlobalAllocation(min_density=0.01),
}


@dataclass
class Bench:
    """One seed of one pair.

    Attributes:
        pair: The pair.
        data: Its data.
        seed: Of first weights, order and dropout.
        work: Where the dense net after half of the steps is kept.
    """

    pair: Pair
    data: Data
    seed: int
    work: Path

    @property
    def half(self) -> int:
        """Return half of the epochs."""
        return self.pair.epochs // 2

    def new(self, share: float = 1.0) -> nn.Module:
        """Build the net, or a narrower one."""
        return fresh(self.pair, self.seed, share)

    def train(self, model: nn.Module, **how: Any) -> int:
        """Train for all steps, or as `setting.train` is told."""
        return train(model, self.data, self.pair, seed=self.seed, **how)

    def trained_half(self) -> tuple[nn.Module, int]:
        """Return the dense net after half of the steps, its learning rate having come down to 0."""
        model, steps = self.new(), self.half * (len(self.data.train[1]) // self.pair.batch)
        file = self.work / f"{self.pair.name}_{parameters(model)}_{steps}_{self.seed}.pt"
        if not file.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            self.train(model, epochs=self.half)
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, weights_only=True))
        return model, steps

    def train_second_half(self, model: nn.Module, **how: Any) -> int:
        """Train for the other half of the steps, with a learning rate that goes up and down again."""
        return self.train(model, epochs=self.half, first_epoch=self.half, **how)


Arm = Callable[[Bench], tuple[nn.Module, int]]


def dense(bench: Bench) -> tuple[nn.Module, int]:
    """Prune nothing."""
    model = bench.new()
    return model, bench.train(model)


def small_dense(share_of: float, bench: Bench) -> tuple[nn.Module, int]:
    """Train a narrower net that has as many parameters as stay in the pruned one, biases and norms included."""
    full = bench.new()
    weights = sum(module.weight.numel() for module in weights_of(full).values())  # type: ignore[operator, misc]
    target = parameters(full) - round(share_of * weights)
    sizes = sizes_of(bench.pair.name)
    model = bench.new(min(sizes, key=lambda share: abs(sizes[share] - target)))
    return model, bench.train(model)


@cache
def sizes_of(pair: str) -> dict[float, int]:
    """Return the parameters of narrower nets."""
    return {share: parameters(PAIRS[pair].net(share)) for share in (i / 200 for i in range(1, 200))}


def gradual(
    share: float, bench: Bench, *, allocation: str = "erk", random: bool = False, **moments: Any
) -> tuple[nn.Module, int]:
    """Prune from the first weights on, little by little: conf/pruner/magnitude.yaml."""
    model = bench.new()
    criterion = Random() if random else Magnitude()
    how = {"start": 0.1, "end": 0.7, "every": 0.01, "schedule": Cubic(), **moments}
    pruner = Prune(sparsity=share, allocation=ALLOCATIONS[allocation], criterion=criterion, seed=bench.seed, **how)
    return model, bench.train(model, callbacks=[pruner])


def second_half(
    share: float,
    bench: Bench,
    *,
    allocation: str = "erk",
    with_self: bool = False,
    at_once: bool = False,
    start: float | str = "0 steps",
    end: float = 0.5,
) -> tuple[nn.Module, int]:
    """Train the dense net for half of the steps, prune it in the other half, with it as its teacher if wanted."""
    model, before = bench.trained_half()
    teacher = Teacher(copy.deepcopy(model)) if with_self else None
    moments: Any = {"start": "0 steps", "end": "0 steps"} if at_once else {"start": start, "end": end}
    pruner = Prune(
        sparsity=share, allocation=ALLOCATIONS[allocation], schedule=OneShot() if at_once else Cubic(), **moments
    )
    return model, before + bench.train_second_half(model, callbacks=[pruner], teacher=teacher)


def torch_one_shot(share: float, bench: Bench) -> tuple[nn.Module, int]:
    """Train the dense net for half of the steps, prune with `torch.nn.utils.prune` over all layers, fine-tune."""
    model, before = bench.trained_half()
    targets = [(module, "weight") for module in weights_of(model).values()]
    torch_prune.global_unstructured(targets, pruning_method=torch_prune.L1Unstructured, amount=share)
    steps = before + bench.train_second_half(model)
    for module, name in targets:
        torch_prune.remove(module, name)
    return model, steps


def lightning(share: float, bench: Bench) -> tuple[nn.Module, int]:
    """Prune with Lightning's `ModelPruning`, told how many more weights to prune after each epoch.

    The amounts follow the cubic schedule of our arms from 10 to 70 % of the epochs, and the lottery ticket, on by
    default, is off: this is the peer at its best, not as its page shows it (see `lightning_as_documented`).
    """
    model = bench.new()
    targets = [(module, "weight") for module in weights_of(model).values()]
    count = sum(module.weight.numel() for module, _ in targets)  # type: ignore[operator, misc]
    first, last = 0.1 * bench.pair.epochs, 0.7 * bench.pair.epochs

    def gone_after(epoch: int) -> int:
        progress = min(max((epoch + 1 - first) / (last - first), 0.0), 1.0)
        return round(share * count * Cubic().at(progress))

    pruner = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=targets,
        amount=lambda epoch: gone_after(epoch) - gone_after(epoch - 1),
        use_lottery_ticket_hypothesis=False,
    )
    return model, bench.train(model, callbacks=[pruner])


def lightning_as_documented(share: float, bench: Bench) -> tuple[nn.Module, int]:
    """Prune with `ModelPruning(amount=share)` and its defaults."""
    model = bench.new()
    targets = [(module, "weight") for module in weights_of(model).values()]
    pruner = ModelPruning("l1_unstructured", parameters_to_prune=targets, amount=share)
    return model, bench.train(model, callbacks=[pruner])


def _structured(bench: Bench, criterion: Any, **moments: Any) -> Prune:
    return Prune(
        Structures(kinds=UNITS, round_to=ROUND_TO),
        criterion=criterion,
        sparsity=0.5,
        of="flops",
        example_inputs=bench.data.train[0][:2],
        seed=bench.seed,
        observe_steps=16,
        **{"start": 0.1, "end": 0.4, "every": 0.02, **moments},
    )


def structured(bench: Bench, *, criterion: Callable[[], Any] = GroupNorm, **moments: Any) -> tuple[nn.Module, int]:
    """Mask units little by little from the first weights on, remove them, heal: conf/pruner/channels.yaml."""
    model = bench.new()
    return model, bench.train(model, callbacks=[_structured(bench, criterion(), **moments)])


def structured_second_half(bench: Bench, *, with_self: bool = False) -> tuple[nn.Module, int]:
    """Train the dense net for half of the steps, then remove units, with it as the teacher if wanted."""
    model, before = bench.trained_half()
    teacher = Teacher(copy.deepcopy(model)) if with_self else None
    pruner = _structured(bench, GroupNorm(), start="0 steps")
    return model, before + bench.train_second_half(model, callbacks=[pruner], teacher=teacher)


def same_shape(bench: Bench) -> tuple[nn.Module, int]:
    """Train the architecture that structured pruning leaves, from first weights of its own."""
    model, example = bench.new(), bench.data.train[0][:2]
    shrink(model, example, ratio=0.5, of="flops", round_to=ROUND_TO, kinds=UNITS, importance="random")
    torch.manual_seed(bench.seed)
    init_convolutions(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model, bench.train(model)


def measures(model: nn.Module, data: Data) -> dict[str, float]:
    """Return the sparsity, the parameters that are not zero and the multiply-accumulates of one sample."""
    flops = count_flops(model, data.train[0][:2], batch=1)
    return {
        "sparsity": round(sparsity(model), 5),
        "nonzero": parameters(model, nonzero=True),
        "macs": int(flops.total) // 2,
    }


# What is tried on validation parts, with a seed of its own.
RECIPES: dict[str, dict[str, Any]] = {
    "erk": {"allocation": "erk"},
    "lamp": {"allocation": "lamp"},
    "global": {"allocation": "global"},
}


def arms_of(recipe: str) -> list[dict[str, Arm]]:
    """Name the arms of a pair, first those that the others are beside; "NAME@95" prunes 95 % of the weights.

    Args:
        recipe: Name of the one that was best on the validation parts.
    """
    first: dict[str, Arm] = {"dense": dense, **_main_arms(0.95, recipe)}
    first |= {"structured": structured, "structured_scratch": same_shape}
    second = _main_arms(0.98, recipe)
    third = _controls(0.95, recipe) | _controls(0.98, recipe)
    third["structured_random"] = partial(structured, criterion=Random)
    fourth = {f"self@{share * 100:.0f}": _self(share, recipe) for share in (0.95, 0.98)}
    fourth["structured_self"] = partial(structured_second_half, with_self=True)
    fourth["structured_taylor"] = partial(structured, criterion=FirstOrder)
    fifth = _main_arms(0.90, recipe) | _controls(0.90, recipe) | {"self@90": _self(0.90, recipe)}
    return [first, second, third, fourth, fifth, _other_arms((0.95, 0.98), recipe)]


def _main_arms(share: float, recipe: str) -> dict[str, Arm]:
    how, at = RECIPES[recipe], f"@{share * 100:.0f}"
    return {
        f"gradual{at}": partial(gradual, share, **how),
        f"lightning{at}": partial(lightning, share),
        f"one_shot{at}": partial(second_half, share, at_once=True, **how),
        f"torch{at}": partial(torch_one_shot, share),
    }


def _controls(share: float, recipe: str) -> dict[str, Arm]:
    at = f"@{share * 100:.0f}"
    random = partial(gradual, share, random=True, **RECIPES[recipe])
    return {f"random{at}": random, f"small{at}": partial(small_dense, share)}


def _self(share: float, recipe: str) -> Arm:
    return partial(second_half, share, with_self=True, **RECIPES[recipe])


def _other_arms(shares: Sequence[float], recipe: str) -> dict[str, Arm]:
    """Take the other allocations, and the self's arms without the self."""
    arms: dict[str, Arm] = {"structured_second_half": structured_second_half}
    for share in shares:
        arms[f"second_half@{share * 100:.0f}"] = partial(second_half, share, **RECIPES[recipe])
        for name in RECIPES:
            if name != recipe:
                arms[f"gradual_{name}@{share * 100:.0f}"] = partial(gradual, share, **RECIPES[name])
    return arms
