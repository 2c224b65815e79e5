"""Prune a trained model at once, layer by layer, from a few calibration batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs, forward
from lightning_opt.pruning.criteria.base import Criterion, Evidence
from lightning_opt.pruning.inputs import EmbeddingReader, TransposedConvReader, first_tensor, reader_for
from lightning_opt.pruning.patterns import NM, Block, Element, Pattern
from lightning_opt.pruning.sparse_gpt import SlabChooser, SparseGPT, keep_largest
from lightning_opt.pruning.statistics import Statistics


class _EnoughError(Exception):
    """Ends a forward pass: what comes later is not needed."""


def prune_with(
    model: nn.Module,
    batches: Iterable[Inputs],
    by: SparseGPT | Criterion,
    *,
    pattern: Pattern,
    sparsity: float | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    compare: Literal["layer", "output"] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Prune layer after layer in the order in which the model calls them, in place.

    Each layer is calibrated on what it gets from the layers before it as they are after their own pruning (Frantar and
    Alistarh 2023, arXiv 2301.00774, section 4; Sun et al. 2023, arXiv 2306.11695, algorithm 1). Layers that read the
    same tensor, such as queries, keys and values, are calibrated in one pass. Every layer loses the same share. The
    model runs in evaluation mode and gets its own modes back.

    Args:
        model: Any model; changed in place.
        batches: Inputs to calibrate on; a few hundred rows are enough for small layers.
        by: A solver, or a criterion that needs no gradients.
        pattern: Element, N:M or blocks.
        sparsity: Share of each layer's weights that goes, in [0, 1); left out where the pattern says it.
        include: Patterns (`fnmatch`) of full weight names. Weights of linear layers, convolutions and modules with a
            two-dimensional weight that is multiplied with inputs are pruned; embeddings never are.
        exclude: Patterns of weights to leave alone, such as the output layer, as the papers do.
        compare: Where single weights compete: within the "layer" or within each "output". None: as the criterion's
            authors do.
        seed: For criteria that draw.

    Returns:
        The masks by name, True = kept.

    Raises:
        ValueError: Nothing matches, a layer is not called, or the pattern and the sparsity do not say how much goes.
    """
    chooser = SlabChooser(pattern, _wanted(pattern, sparsity))
    _check_needs(by)
    names = _matching(model, include, exclude)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    calibration = list(batches)
    masks: dict[str, Tensor] = {}
    with _evaluating(model), torch.no_grad():
        stages, once = _stages(model, names, calibration)
        for stage in stages:
            statistics = _observed(model, stage, by.needs, calibration, stop=once)
            for name in stage:
                evidence, weight = statistics.evidence(name, seed=seed), parameters[name]
                new, masks[name] = prune_weight(weight, evidence, by, chooser, compare or by.compares)
                weight.copy_(new)
    return masks


def prune_weight(
    weight: Tensor, evidence: Evidence, by: SparseGPT | Criterion, chooser: SlabChooser, compare: str
) -> tuple[Tensor, Tensor]:
    """Prune one weight by what is known about it.

    Args:
        weight: As its layer keeps it; not changed.
        evidence: What `by` reads, and how the weight lies.
        by: A solver or a criterion.
        chooser: Pattern and sparsity; they see the weight as `(out, in, *kernel)`.
        compare: "layer" or "output", see `prune_with`; a solver does not read it.

    Returns:
        The new weight, with exact zeros, and its bool mask.

    Raises:
        ValueError: The pattern does not fit the weight or the solver, or evidence is missing.
    """
    turned = evidence.input_dim == 0
    upright = weight.T if turned else weight
    chooser.pattern.check(evidence.name, upright.shape)
    if isinstance(by, SparseGPT):
        new, mask = _solve(upright, evidence, by, chooser)
    else:
        scores = by.score(weight, evidence)
        mask = _choose(scores.T if turned else scores, chooser, compare)
        new = upright * mask
    return (new.T, mask.T.contiguous()) if turned else (new, mask)


def _choose(scores: Tensor, chooser: SlabChooser, compare: str) -> Tensor:
    if compare == "output" and isinstance(chooser.pattern, Element):
        rows = scores.flatten(1)
        return keep_largest(rows, round((1.0 - chooser.sparsity) * rows.shape[1])).view_as(scores)
    return chooser(scores)


def _solve(weight: Tensor, evidence: Evidence, by: SparseGPT, chooser: SlabChooser) -> tuple[Tensor, Tensor]:
    """Solve a layer as a matrix whose neighbouring columns are neighbouring channels, as N:M and blocks want them."""
    if not isinstance(chooser.pattern, Element | NM | Block):
        raise ValueError(f"SparseGPT chooses as it goes from column to column; {chooser.pattern} is not for it")
    last = weight.movedim(1, -1)
    solved = [by.solve(part, gram, chooser) for part, gram in _by_group(last.flatten(1), evidence, weight)]
    new, mask = (torch.cat(parts).view(last.shape).movedim(-1, 1) for parts in zip(*solved, strict=True))
    return new.contiguous(), mask.contiguous()


def _by_group(matrix: Tensor, evidence: Evidence, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of the matrix with the `X^T X` that belongs to them, in the matrix's order of columns."""
    gram = evidence.require("gram")
    grams = gram.view(evidence.groups, *gram.shape[-2:])
    order = torch.arange(matrix.shape[1], device=gram.device).view(weight.shape[1], -1).T.flatten()
    yield from zip(matrix.chunk(evidence.groups), grams[:, order][:, :, order], strict=True)


def _wanted(pattern: Pattern, sparsity: float | None) -> float:
    if pattern.density is not None:
        return 1.0 - pattern.density
    if sparsity is None:
        raise ValueError(f"sparsity must be given: {pattern} leaves it open")
    return sparsity


def _check_needs(by: SparseGPT | Criterion) -> None:
    gradients = sorted(by.needs - {"input_norm", "gram", "output_norm"})
    if gradients:
        kind = type(by).__name__
        raise ValueError(f"{kind} reads the {gradients[0]}, which forward passes do not give; prune while training")


def _matching(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    names = []
    for name, weight in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        reader = reader_for(model.get_submodule(path), leaf)
        if reader is None or weight.dim() < 2 or isinstance(reader, EmbeddingReader | TransposedConvReader):
            continue
        if any(fnmatch(name, one) for one in include) and not any(fnmatch(name, one) for one in exclude):
            names.append(name)
    if not names:
        raise ValueError(f"include={list(include)} with exclude={list(exclude)} leaves no weight that can be pruned")
    return names


def _stages(model: nn.Module, names: Sequence[str], batches: Sequence[Inputs]) -> tuple[list[list[str]], bool]:
    """Sort weights by the order of their layers' calls; those that read the same tensor share a stage.

    Returns:
        The stages, and whether every layer is called once only.
    """
    if not batches:
        raise ValueError("batches is empty; layers are put in order, and calibrated, by calling the model")
    calls: list[tuple[str, Tensor | None]] = []  # holds the tensors, so that none takes the place of another

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.append((name, first_tensor(args, kwargs)))

    with _hooks(model, {name: note(name) for name in names}, before=True):
        forward(model, batches[0])
    read = dict(reversed(calls))  # the first call of each counts
    missing = [name for name in names if name not in read]
    if missing:
        raise ValueError(f"the layer of {missing[0]} is not called by the model; exclude it")
    stages: list[list[str]] = []
    for name in dict(calls):
        if stages and read[name] is read[stages[-1][-1]]:
            stages[-1].append(name)
        else:
            stages.append([name])
    return stages, len(calls) == len(read)


def _observed(
    model: nn.Module, stage: Sequence[str], needs: frozenset[str], batches: Sequence[Inputs], *, stop: bool
) -> Statistics:
    """Run the batches through the layers of a stage; with `stop`, no further than that."""
    statistics = Statistics(model, stage, needs)
    if not needs:
        return statistics

    def enough(*_: Any) -> None:
        raise _EnoughError

    with statistics.calibrating(), _hooks(model, {stage[-1]: enough} if stop else {}, before=False):
        for batch in batches:
            with suppress(_EnoughError):
                forward(model, batch)
    return statistics


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Callable[..., Any]], *, before: bool) -> Iterator[None]:
    handles = []
    for name, hook in hooks.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        register = owner.register_forward_pre_hook if before else owner.register_forward_hook
        handles.append(register(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
