"""A checker for criteria and patterns of pruning: what masks, schedules and resumed runs here expect of them."""

import copy
from dataclasses import fields

import torch
from torch import Tensor, nn

from lightning_opt.forward import Inputs, batch_size_of, forward, logits_of
from lightning_opt.pruning.allocation import Allocation, GlobalAllocation
from lightning_opt.pruning.criteria import Criterion, Evidence
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.patterns import Element, Pattern
from lightning_opt.pruning.selection import select
from lightning_opt.pruning.statistics import Statistics

_SCORED_FROM = frozenset(field.name for field in fields(Evidence)) - {"name", "seed", "input_dim", "groups"}
_FRACTIONS = (0.0, 0.3, 0.7, 1.0)


def check_pruner(
    model: nn.Module,
    inputs: Inputs,
    *,
    criterion: Criterion,
    pattern: Pattern = Element(),  # noqa: B008 - frozen
    allocation: Allocation | None = None,
    sparsity: float = 0.8,
    tolerance: float = 0.02,
) -> None:
    """Assert that a criterion, a pattern and an allocation prune as `callbacks.Prune` needs it, on a model of yours.

    Scores have the weight's shape, are finite float32 and the same when asked again; nothing that is read is changed;
    masks have the weight's shape and, together, the sparsity that is asked for, of the weights as they were at first,
    however often they are chosen again on the way; a pattern gives back what it pooled; masked weights stay zero over
    optimizer steps with weight decay and momentum; and masks survive a round trip through a checkpoint. `model` itself
    is left as it was: everything runs on a copy.

    Args:
        model: Its weights with two dimensions or more are pruned.
        inputs: A batch; the mean square of the answer stands for a loss.
        criterion: What is checked.
        pattern: What is checked with it.
        allocation: Likewise; one ranking over all tensors when not given.
        sparsity: Share that goes in the end; a pattern that fixes its density does not read it.
        tolerance: How far from it the masks may be, for the rounding of whole units in small tensors.

    Raises:
        AssertionError: What is wrong, in one sentence.

    >>> from lightning_opt.pruning import Magnitude
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> check_pruner(model, torch.randn(5, 8), criterion=Magnitude())
    """
    _check_needs(criterion)
    assert batch_size_of(inputs) > 0, "inputs are empty"
    allocation = allocation or GlobalAllocation()
    job = _Job(copy.deepcopy(model).train(), inputs, criterion)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for fraction in _FRACTIONS:
            job.step()
            chosen = select(job.scores(), pattern=pattern, allocation=allocation, sparsity=sparsity, fraction=fraction)
            _check_masks(chosen, job.weights, pattern)
            job.mask(chosen)
        found, final = job.masks.sparsity(), 1.0 - pattern.density if pattern.density is not None else sparsity
        assert abs(found - final) <= tolerance, (
            f"{type(pattern).__name__} with {type(allocation).__name__}: {found:.4f} of the weights are masked after "
            f"{len(_FRACTIONS)} updates, {final:.4f} were asked for"
        )
        for _ in range(3):
            job.step()
    for name, mask in chosen.items():
        assert not bool(job.weights[name][~mask].any()), f"{name}: masked weights came back"
    _check_round_trip(job.masks, job.weights)


class _Job:
    """A copy of a model in training."""

    def __init__(self, model: nn.Module, inputs: Inputs, criterion: Criterion) -> None:
        self.model, self.inputs, self.criterion = model, inputs, criterion
        self.weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and p.requires_grad}
        self.masks = Masks(self.weights)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        self.statistics = Statistics.of(model, self.weights, criterion)

    def step(self) -> None:
        self.statistics.install()
        self.optimizer.zero_grad()
        logits_of(forward(self.model, self.inputs)).float().square().mean().backward()
        self.statistics.after_backward()
        self.statistics.remove()
        self.optimizer.step()
        self.masks.apply()

    def scores(self) -> dict[str, Tensor]:
        return {name: self._score(name, weight.detach()) for name, weight in self.weights.items()}

    def mask(self, chosen: dict[str, Tensor]) -> None:
        newly = self.masks.update(chosen)
        self.masks.apply()
        self.masks.clear_moments([self.optimizer], newly=newly)

    def _score(self, name: str, weight: Tensor) -> Tensor:
        kept, who = weight.clone(), f"{type(self.criterion).__name__}.score of {name}"
        score = self.criterion.score(weight, self.statistics.evidence(name))
        assert isinstance(score, Tensor), f"{who} is a {type(score).__name__}, not a tensor"
        assert score.shape == weight.shape, f"{who} has shape {tuple(score.shape)}, the weight {tuple(weight.shape)}"
        assert score.dtype == torch.float32, f"{who} is {score.dtype}, not float32"
        assert bool(score.isfinite().all()), f"{who} is not finite everywhere"
        assert torch.equal(weight, kept), f"{who} changes the weight"
        again = self.criterion.score(weight, self.statistics.evidence(name))
        assert torch.equal(score, again), f"{who} is another one when asked again: ranks and resumed runs would differ"
        return score


def _check_needs(criterion: Criterion) -> None:
    name, unknown = type(criterion).__name__, sorted(criterion.needs - _SCORED_FROM)
    assert not unknown, f"{name}.needs has {unknown}; evidence has {', '.join(sorted(_SCORED_FROM))}"


def _check_masks(masks: dict[str, Tensor], weights: dict[str, nn.Parameter], pattern: Pattern) -> None:
    who = type(pattern).__name__
    for name, weight in weights.items():
        mask = masks[name]
        assert mask.dtype == torch.bool, f"{who} gives a mask of {mask.dtype} for {name}"
        assert mask.shape == weight.shape, f"{who} gives a mask of {tuple(mask.shape)} for {name} {tuple(weight.shape)}"
        assert bool(mask.any()), f"{name} is emptied: nothing would pass through it"
        units = pattern.pool(mask.float())
        size = pattern.unit_size(weight.shape)
        assert units.shape == (weight.numel() // size,), f"{who}.pool gives {tuple(units.shape)} units for {name}"
        again = pattern.expand(units == size, weight.shape)
        assert torch.equal(again, mask), f"{who}: pool and expand do not fit each other on {name}"


def _check_round_trip(masks: Masks, weights: dict[str, nn.Parameter]) -> None:
    other = Masks(weights)
    other.load_state_dict(masks.state_dict())
    for name in weights:
        assert torch.equal(other[name], masks[name]), f"the mask of {name} is another one after a checkpoint"
