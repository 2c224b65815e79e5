"""Visit the layers of a model in the order of their calls, with what each of them reads.

Improvements that rewrite weights layer by layer calibrate each layer on what the layers before it give after their own
rewriting. Layers that read the same tensor, such as queries, keys and values, are visited together.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.evaluation.state import evaluation_mode
from lightning_opt.forward import Inputs, forward
from lightning_opt.pruning.inputs import first_tensor


class _EnoughError(Exception):
    """Ends a forward pass: what comes later is not needed."""


@dataclass(frozen=True)
class Stage:
    """Layers that read the same tensor.

    Attributes:
        paths: Their full names.
        calls: How often they are called, all together, within one forward pass of the model.
    """

    paths: tuple[str, ...]
    calls: int


@torch.no_grad()
def stages(model: nn.Module, paths: Sequence[str], inputs: Inputs) -> tuple[Stage, ...]:
    """Sort layers by the order of their first calls; those that read the same tensor share a stage.

    Args:
        model: Any model; it runs once, in evaluation mode.
        paths: Full names of layers; those that are never called are in no stage.
        inputs: One batch.
    """
    called: list[tuple[str, Tensor | None]] = []  # holds the tensors, so that none takes the place of another

    def note(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        called.append((path, first_tensor(args, kwargs)))

    with evaluation_mode(model), _pre_hooks(model, {path: partial(note, path) for path in paths}):
        forward(model, inputs)
    counts, read = Counter(path for path, _ in called), dict(reversed(called))  # the first call of each counts
    groups: list[list[str]] = []
    for path in dict(called):
        if groups and read[path] is read[groups[-1][-1]]:
            groups[-1].append(path)
        else:
            groups.append([path])
    return tuple(Stage(tuple(group), sum(counts[path] for path in group)) for group in groups)


@torch.no_grad()
def inputs_of(model: nn.Module, stage: Stage, inputs: Inputs) -> dict[str, list[Tensor]]:
    """Run one batch, no further than to the last call of a stage.

    Returns:
        What each layer of the stage was given, one tensor for each of its calls.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in stage.paths}

    def take(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor(args, kwargs)
        if x is not None:
            seen[path].append(x.detach())
        if sum(map(len, seen.values())) == stage.calls:
            raise _EnoughError

    hooks = {path: partial(take, path) for path in stage.paths}
    with evaluation_mode(model), _pre_hooks(model, hooks), suppress(_EnoughError):
        forward(model, inputs)
    return seen


def paired_inputs_of(
    model: nn.Module, reference: nn.Module, stage: Stage, batches: Sequence[Inputs]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield, for each layer of a stage and each of its calls, what it is given in `model` and in `reference`.

    Raises:
        ConfigError: A layer is given other numbers of values in one of the models, as where values choose the way.
    """
    for batch in batches:
        ours, theirs = inputs_of(model, stage, batch), inputs_of(reference, stage, batch)
        for path in stage.paths:
            if [x.shape for x in ours[path]] != [x.shape for x in theirs[path]]:
                raise ConfigError(f"layer {path} is given other shapes once values are rounded; exclude it")
            for x, wanted in zip(ours[path], theirs[path], strict=True):
                yield path, x, wanted


@contextmanager
def _pre_hooks(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True) for path, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of parameters that more than one place in the model holds."""
    places = (parameter for module in model.modules() for parameter in module._parameters.values())
    held = Counter(id(parameter) for parameter in places if parameter is not None)
    return {key for key, count in held.items() if count > 1}
