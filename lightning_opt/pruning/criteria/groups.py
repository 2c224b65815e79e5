"""Criteria for structures: the worth of each channel, head or hidden unit over all tensors that it runs through."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_opt.pruning.criteria.base import Criterion, Evidence, finite
from lightning_opt.pruning.criteria.magnitude import Magnitude

if TYPE_CHECKING:
    from lightning_opt.pruning.statistics import Statistics
    from lightning_opt.pruning.structure.groups import Member
    from lightning_opt.pruning.structure.structure import Structure


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One parameter that a group of structures runs through, along one dimension.

    Attributes:
        weight: The parameter.
        dim: The dimension of the parameter along which the units lie.
        index: `(units, k)` int64: the positions along `dim` that belong to each unit.
        evidence: What is known about the parameter.
        owner: The module that holds the parameter.
    """

    weight: Tensor
    dim: int
    index: Tensor
    evidence: Evidence
    owner: nn.Module

    def per_unit(self, values: Tensor) -> Tensor:
        """Sum `values`, the weight's shape, over each unit's slice: `(units,)`."""
        return self.gather(values.movedim(self.dim, 0).reshape(values.shape[self.dim], -1).sum(dim=1))

    def gather(self, along: Tensor) -> Tensor:
        """Sum `along`, one value for each position of `dim`, over each unit's positions: `(units,)`."""
        return along[self.index].sum(dim=1)

    @property
    def elements(self) -> int:
        """Elements of the parameter in each unit's slice."""
        return self.index.shape[1] * (self.weight.numel() // self.weight.shape[self.dim])


class GroupCriterion(ABC):
    """Base of all scores of structures; subclasses are frozen dataclasses."""

    @property
    def needs(self) -> frozenset[str]:
        """Name the fields of `Evidence` that the criterion reads."""
        return frozenset()

    @abstractmethod
    def score(self, members: Sequence[Part]) -> Tensor:
        """Return the worth of each unit of one group: `(units,)`, float32, finite, larger = keep.

        Args:
            members: All parameters that the group runs through; a parameter may be there more than once.

        Raises:
            ValueError: No member has what the criterion reads.
        """


@dataclass(frozen=True)
class GroupNorm(GroupCriterion):
    """Sum a criterion of single weights over everything that would go with the unit.

    Fang, Ma, Song, Mi, Wang (2023), "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900, section 3.3: with
    `Magnitude(p=2)` it is the squared L2 norm of the unit's slices in all coupled parameters together. Members for
    which the criterion's evidence does not exist (a bias has no inputs) count for nothing.

    Args:
        criterion: Scores the elements.
        reduce: "sum" over the unit's elements, or their "mean".
        normalize: "mean" divides by the group's mean absolute score, so that units of different groups can be compared;
            None leaves the scores as they are.

    Raises:
        ValueError: `reduce` or `normalize` is not known.
    """

    criterion: Criterion = field(default_factory=lambda: Magnitude(p=2))
    reduce: Literal["sum", "mean"] = "sum"
    normalize: Literal["mean"] | None = "mean"

    def __post_init__(self) -> None:
        if self.reduce not in ("sum", "mean"):
            raise ValueError(f"reduce must be 'sum' or 'mean', not {self.reduce!r}")
        if self.normalize not in ("mean", None):
            raise ValueError(f"normalize must be 'mean' or None, not {self.normalize!r}")

    @property
    def needs(self) -> frozenset[str]:
        return self.criterion.needs

    def score(self, members: Sequence[Part]) -> Tensor:
        usable = [m for m in members if all(getattr(m.evidence, need) is not None for need in self.needs)]
        _some(usable, members, what=f"a tensor with {' and '.join(sorted(self.needs))}")
        parts = [member.per_unit(self.criterion.score(member.weight, member.evidence)) for member in usable]
        total = torch.stack(parts).sum(dim=0)
        if self.reduce == "mean":
            total = total / sum(member.elements for member in usable)
        return finite(_relative(total) if self.normalize == "mean" else total)


@dataclass(frozen=True)
class BatchNormScale(GroupCriterion):
    """Keep the channels whose batch norm scales them up.

    Liu, Li, Shen, Huang, Yan, Zhang (2017), "Learning Efficient Convolutional Networks through Network Slimming",
    arXiv 1708.06519, section 3: `|gamma|`, made sparse while training by an L1 penalty on all scales (equation 1;
    `sparsity_penalty`). A channel with several batch norms counts the sum of their scales. Scales are comparable across
    layers, so nothing is normalized.
    """

    def score(self, members: Sequence[Part]) -> Tensor:
        scales = [m for m in members if isinstance(m.owner, _BatchNorm) and m.owner.weight is m.weight]
        _some(scales, members, what="the scale of a batch norm")
        return finite(torch.stack([member.per_unit(member.weight.detach().abs()) for member in scales]).sum(dim=0))


@dataclass(frozen=True)
class Activation(GroupCriterion):
    """Keep the units that are active on data.

    Muralidharan et al. (2024), "Compact Language Models via Pruning and Knowledge Distillation", arXiv 2407.14679,
    section 2.2: the norm of a unit's activation over calibration samples. They sum the output of a head and of a hidden
    layer; here it is the L2 norm over all rows.

    Args:
        side: "input": as the layers see it that read the unit, after norm and activation function. "output": as the
            layers write it that produce it.
        normalize: As in `GroupNorm`.

    Raises:
        ValueError: `side` is not known.
    """

    side: Literal["input", "output"] = "input"
    normalize: Literal["mean"] | None = "mean"

    def __post_init__(self) -> None:
        if self.side not in ("input", "output"):
            raise ValueError(f"side must be 'input' or 'output', not {self.side!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({f"{self.side}_norm"})

    def score(self, members: Sequence[Part]) -> Tensor:
        along = _squared_inputs if self.side == "input" else _squared_outputs
        found = [(member, along(member)) for member in members]
        parts = [member.gather(squares) for member, squares in found if squares is not None]
        _some(parts, members, what=f"a layer whose {self.side}s along the group were observed")
        norm = torch.stack(parts).sum(dim=0).sqrt()
        return finite(_relative(norm) if self.normalize == "mean" else norm)


@dataclass(frozen=True)
class FirstOrder(GroupCriterion):
    """Keep the units whose removal changes the loss, all their parameters taken together.

    Molchanov, Mallya, Tyree, Frosio, Kautz (2019), arXiv 1906.10771, section 3.1, group contribution:
    `(sum of g * w over the unit's parameters)^2`, where `GroupNorm(Taylor())` is the sum of `(g * w)^2`. Reads the mean
    gradient.

    Args:
        normalize: As in `GroupNorm`; the paper compares all layers as they are.
    """

    normalize: Literal["mean"] | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gradient"})

    def score(self, members: Sequence[Part]) -> Tensor:
        usable = [member for member in members if member.evidence.gradient is not None]
        _some(usable, members, what="a parameter with a gradient")
        parts = [member.per_unit(_product(member)) for member in usable]
        squared = torch.stack(parts).sum(dim=0).square()
        return finite(_relative(squared) if self.normalize == "mean" else squared)


def score_groups(
    structure: "Structure",
    model: nn.Module,
    criterion: GroupCriterion | Criterion,
    statistics: "Statistics | None" = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score the units of every group of a traced model.

    Args:
        structure: What `pruning.structure.trace` found.
        model: The model that was traced.
        criterion: A criterion of single weights is summed over each unit and made comparable across groups
            (`GroupNorm`).
        statistics: What was observed; not needed for criteria that read the weights alone.
        seed: For criteria that draw.

    Returns:
        `(units,)` scores by group name.

    Raises:
        ValueError: A group has no member that the criterion can read; the message names it.
    """
    chosen = GroupNorm(criterion) if isinstance(criterion, Criterion) else criterion
    scores = {}
    for group in structure.groups:
        members = list(_parts(structure.unit_slices(group), model, statistics, seed))
        try:
            scores[group.name] = chosen.score(members)
        except ValueError as error:
            raise ValueError(f"group {group.name} cannot be scored: {error}") from error
    return scores


def _parts(members: "Iterable[Member]", model: nn.Module, statistics: "Statistics | None", seed: int) -> Iterable[Part]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for member in members:
        name = member.tensor
        if name not in parameters:  # a buffer, such as a running mean: goes with the unit, says nothing of its worth
            continue
        weight = parameters[name]
        known = statistics is not None and name in statistics.names
        evidence = statistics.evidence(name, seed=seed) if known and statistics else Evidence(name=name, seed=seed)
        owner = model.get_submodule(name.rpartition(".")[0])
        places = member.indices.to(weight.device)
        yield Part(weight=weight, dim=member.dim, index=places, evidence=evidence, owner=owner)


def _some(found: Sequence[Any], members: Sequence[Part], *, what: str) -> None:
    if not found:
        names = ", ".join(sorted({member.evidence.name for member in members})) or "nothing"
        raise ValueError(f"it needs {what}, and the group has none; it runs through {names}")


def _relative(scores: Tensor) -> Tensor:
    return scores / scores.abs().mean().clamp(min=torch.finfo(scores.dtype).tiny)


def _product(member: Part) -> Tensor:
    return member.evidence.require("gradient").float() * member.weight.detach().float()


def _squared_inputs(member: Part) -> Tensor | None:
    """Return the squared norm of what the layer reads at each position along the member's dim, or None."""
    evidence, shape = member.evidence, member.weight.shape
    if evidence.input_norm is None:
        return None
    squares = evidence.input_norm.float().square()
    if member.dim == evidence.input_dim:
        return squares.view(evidence.groups if evidence.input_dim else 1, shape[member.dim], -1).sum(dim=(0, 2))
    depthwise = evidence.input_dim == 1 and member.dim == 0 and evidence.groups == shape[0]
    return squares.view(shape[0], -1).sum(dim=1) if depthwise else None


def _squared_outputs(member: Part) -> Tensor | None:
    evidence = member.evidence
    output_dim = 0 if member.weight.dim() == 1 else 1 - evidence.input_dim
    if evidence.output_norm is None or member.dim != output_dim or evidence.output_norm.numel() != _length(member):
        return None
    return evidence.output_norm.float().square()


def _length(member: Part) -> int:
    return member.weight.shape[member.dim]
