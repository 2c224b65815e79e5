"""Drop whole layers: find those that change least, and the edits that take them out."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs, forward
from lightning_opt.pruning.inputs import first_tensor
from lightning_opt.surgery import DropLayers, Recipe, Shrink

Position: TypeAlias = Literal["last", "all"]
_LAYER_NUMBER = re.compile(r"^layer_(idx|index|id|number)$")


def find_stack(model: nn.Module) -> str:
    """Return the name of the model's longest run of layers of one class: an `nn.ModuleList` or `nn.Sequential`.

    Raises:
        ValueError: No two layers of one class follow each other.

    Example:
        >>> blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        >>> find_stack(nn.ModuleDict({"stem": nn.Linear(2, 2), "blocks": blocks}))
        'blocks'
    """
    stacks = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(layer) for layer in module}) == 1
        and any(True for _ in module.parameters())
    }
    if not stacks:
        raise ValueError(f"path: {type(model).__name__} has no ModuleList or Sequential with layers of one class")
    return max(stacks, key=lambda name: stacks[name])


def angular_distances(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    path: str | None = None,
    span: int = 1,
    position: Position = "last",
) -> list[float]:
    """Measure how much each run of `span` layers turns what passes through it.

    Gromov, Tirumala, Shapourian, Glorioso, Roberts (2024), "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv 2403.17887, the angular distance of their pruning algorithm: `arccos(x_l . x_(l+n) / (|x_l| |x_(l+n)|)) / pi`,
    averaged over samples, where `x_l` is the input of layer l at the last token.

    Args:
        model: Observed in eval mode, never changed.
        batches: Inputs.
        path: Name of the stack of layers; found when not given.
        span: How many layers n are skipped at once.
        position: "last": the last token, where an `attention_mask` is given the last that it lets through, as in the
            paper, for models that read from left to right. "all": the mean over all tokens that count. What passes as
            `(B, D)` or `(B, C, H, W)` has one vector for each sample or place.

    Returns:
        One distance in [0, 1] for each first layer l of a run.

    Raises:
        ValueError: There are no batches, the stack is not there or is not longer than `span`, or its layers pass on
            other shapes than they get.
    """
    path, stack = _stack(model, path)
    if not 1 <= span < len(stack):
        raise ValueError(f"span must be at least 1 and less than the {len(stack)} layers of {path!r}, not {span}")
    sums, count = torch.zeros(len(stack) + 1 - span, dtype=torch.float64), 0
    with _watching(model, stack) as states:
        for inputs in batches:
            states.clear()
            forward(model, inputs)
            if len(states) != len(stack) + 1:
                raise ValueError(f"path: {path!r} does not run each of its layers once, in order")
            vectors = [_vectors(state, inputs, position) for state in states]
            for first in range(len(sums)):
                sums[first] += _angles(vectors[first], vectors[first + span], path).sum().item()
            count += len(vectors[0])
    if not count:
        raise ValueError("batches is empty: give some inputs to measure the layers with")
    return (sums / count).tolist()


def drop_by_angular_distance(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    drop: int,
    path: str | None = None,
    position: Position = "last",
) -> Recipe:
    """Choose the run of `drop` layers over which what passes turns least (see `angular_distances`).

    Returns:
        The edits that drop them, for `replay` or `apply_with_optimizers`; the model is not changed.

    Raises:
        ValueError: As in `angular_distances`.
    """
    path, stack = _stack(model, path)
    distances = angular_distances(model, batches, path=path, span=drop, position=position)
    first = min(range(len(distances)), key=distances.__getitem__)
    return keep_layers(model, [n for n in range(len(stack)) if not first <= n < first + drop], path=path)


def drop_by_loss(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    drop: int,
    path: str | None = None,
) -> Recipe:
    """Choose `drop` layers one after the other, each time the one without which the loss is least.

    Args:
        model: Judged in eval mode, never changed.
        batches: Whatever `loss` reads; gone through once for each layer that could go.
        loss: Returns the mean loss of a batch.
        drop: How many layers.
        path: Name of the stack of layers; found when not given.

    Returns:
        The edits that drop them; the model is not changed.

    Raises:
        ValueError: There are no batches, or the stack is not there or too short.
    """
    path, stack = _stack(model, path)
    if not 1 <= drop < len(stack):
        raise ValueError(f"drop must be at least 1 and less than the {len(stack)} layers of {path!r}, not {drop}")
    if not batches:
        raise ValueError("batches is empty: give some to judge the layers with")
    kept = list(range(len(stack)))
    for _ in range(drop):
        trials = {layer: [n for n in kept if n != layer] for layer in kept}
        losses = {layer: _loss_with(model, stack, trial, batches, loss) for layer, trial in trials.items()}
        kept = trials[min(losses, key=losses.__getitem__)]
    return keep_layers(model, kept, path=path)


def keep_layers(model: nn.Module, kept: Sequence[int], *, path: str | None = None) -> Recipe:
    """Return the edits that keep some layers of a stack and number them anew, inside as well (`layer_idx`).

    Args:
        model: Not changed.
        kept: Positions to keep, rising.
        path: Name of the stack of layers; found when not given.

    Raises:
        ValueError: The stack is not there, or `kept` does not fit it.
    """
    path, stack = _stack(model, path)
    edit = DropLayers(path, list(kept))
    if edit.kept[-1] >= len(stack):
        raise ValueError(f"kept names layer {edit.kept[-1]}, but {path!r} has {len(stack)} layers")
    layers = list(stack.named_children())
    by_position = [name for name, _ in layers] == [str(n) for n in range(len(layers))]
    numbers: dict[str, dict[str, int]] = {}
    for new, old in enumerate(edit.kept):
        name, layer = layers[old]
        for inner, module in layer.named_modules():
            held = {key: new for key, value in vars(module).items() if _LAYER_NUMBER.match(key) and value == old}
            if held and new != old:
                place = [path, str(new) if by_position else name, inner]
                numbers[".".join(part for part in place if part)] = held
    return Recipe([edit, *([Shrink(kept={}, attributes=numbers)] if numbers else [])])


def _stack(model: nn.Module, path: str | None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    path = find_stack(model) if path is None else path
    try:
        stack = model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"path {path!r} names no module of {type(model).__name__}") from error
    if not isinstance(stack, nn.ModuleList | nn.Sequential):
        raise ValueError(f"path {path!r} is a {type(stack).__name__}, not a ModuleList or Sequential")
    return path, stack


@contextmanager
def _watching(model: nn.Module, stack: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what each layer gets, and what the last returns, while the model is in eval mode."""
    states: list[Tensor] = []

    def keep(*found: Any) -> None:
        tensor = first_tensor(*found)
        if tensor is not None:
            states.append(tensor)

    layers = list(stack)
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: keep(args, kwargs), with_kwargs=True)
        for layer in layers
    ]
    handles.append(layers[-1].register_forward_hook(lambda _, args, output: keep(output)))
    try:
        with _judged(model):
            yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _judged(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _vectors(state: Tensor, inputs: Inputs, position: Position) -> Tensor:
    """Return `(N, D)` float32: a vector for each sample, token or place that counts."""
    state = state.float()
    if state.dim() == 4:
        return state.movedim(1, -1).flatten(0, 2)
    if state.dim() != 3:
        return state.flatten(1)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    mask = torch.ones(state.shape[:2], dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.bool()
    mask = mask.to(state.device)
    if position == "all":
        return state[mask]
    last = mask.long().cumsum(dim=1).argmax(dim=1)
    return state[torch.arange(len(state), device=state.device), last]


def _angles(a: Tensor, b: Tensor, path: str) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"path: the layers of {path!r} pass on other shapes than they get; none can be left out")
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1.0, 1.0)
    return cosine.double().arccos() / math.pi


def _loss_with(
    model: nn.Module,
    stack: nn.ModuleList | nn.Sequential,
    kept: Sequence[int],
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> float:
    """Return the loss with only some layers, and put all of them back."""
    whole = stack._modules
    names = list(whole)
    stack._modules = {str(new): whole[names[old]] for new, old in enumerate(kept)}
    try:
        with _judged(model):
            return sum(float(loss(model, batch)) for batch in batches) / len(batches)
    finally:
        stack._modules = whole
