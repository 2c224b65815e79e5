"""The structure of a model: which units can be cut, and the edit that cuts them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_opt.pruning.structure.attributes import attributes_of
from lightning_opt.pruning.structure.axes import Axis, Factor, leaves
from lightning_opt.pruning.structure.calls import Link
from lightning_opt.pruning.structure.groups import Group, Member, Refusal
from lightning_opt.pruning.structure.provenance import Calls
from lightning_opt.pruning.structure.units import kept_count, kept_mask
from lightning_opt.surgery.shrink import Shrink


@dataclass(frozen=True)
class Structure:
    """What `trace` found.

    Attributes:
        groups: What can be cut.
        refused: Axes of parameters that are not cut, and which operation froze them.
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    _model: nn.Module = field(repr=False)
    _tensors: Mapping[str, list[Axis]] = field(repr=False)
    _links: Sequence[Link] = field(repr=False)
    _calls: Calls = field(repr=False)
    _costs: Sequence[Sequence[Axis]] = field(repr=False)

    def __getitem__(self, name: str) -> Group:
        """Return a group by its name.

        Raises:
            ValueError: There is none; near names are listed.
        """
        found = next((group for group in self.groups if group.name == name), None)
        if found is None:
            raise ValueError(
                f"group {name!r} is not known; there are {', '.join(g.name for g in self.groups) or 'none'}"
            )
        return found

    def edit(self, kept: Mapping[str, Sequence[int]]) -> Shrink:
        """Return the edit that keeps some units of some groups.

        Args:
            kept: For each group to cut, the units that stay, in any order.

        Raises:
            ValueError: A group is not known, would be emptied, or a unit is out of range.
        """
        factors = self._factors(kept)
        cuts: dict[str, dict[int, Sequence[int]]] = {}
        for name, dims in self._cut_axes(factors).items():
            cuts[name] = {dim: mask.nonzero().flatten().tolist() for dim, mask in dims.items()}
        return Shrink(kept=cuts, attributes=self._attributes(factors))

    def masks(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return the same cut as masks of the whole parameters: True where an entry stays.

        With these entries zeroed, the model computes what the smaller one does, where every group is `exact`.

        Raises:
            ValueError: As in `edit`.
        """
        parameters = dict(self._model.named_parameters())
        found = {}
        for name, dims in self._cut_axes(self._factors(kept)).items():
            if name not in parameters:
                continue
            mask = torch.ones(parameters[name].shape, dtype=torch.bool)
            for dim, entries in dims.items():
                mask &= entries.view([-1 if place == dim else 1 for place in range(mask.dim())])
            found[name] = mask
        return found

    def unit_slices(self, group: str | Group) -> tuple[Member, ...]:
        """Return a group's members: tensor, dim, and the entries of each unit `(size, k)`."""
        return self[group.name if isinstance(group, Group) else group].members

    def parameters(self, kept: Mapping[str, Sequence[int]] | None = None) -> int:
        """Return how many parameters the model has once only `kept` is left of some groups."""
        factors = self._factors(kept or {})
        cuts = self._cut_axes(factors)
        total = 0
        for name, parameter in self._model.named_parameters():
            count = 1
            for dim, size in enumerate(parameter.shape):
                mask = cuts.get(name, {}).get(dim)
                count *= size if mask is None else int(mask.sum())
            total += count
        return total

    def flops(self, kept: Mapping[str, Sequence[int]] | None = None) -> int:
        """Return the floating point operations of linear maps, convolutions and attention for the example inputs.

        One multiply-accumulate counts as two.

        Args:
            kept: Units that stay, as in `edit`; None for the model as it is.
        """
        counts = {factor: int(mask.sum()) for factor, mask in self._factors(kept or {}).items()}
        total = 0
        for axes in self._costs:
            count = 2
            for axis in axes:
                count *= kept_count(axis, counts)
            total += count
        return total

    def _attributes(self, factors: Mapping[Factor, Tensor]) -> dict[str, dict[str, Any]]:
        counts = {factor: int(mask.sum()) for factor, mask in factors.items()}
        return attributes_of(self._model, self._links, self._calls, counts)

    def _factors(self, kept: Mapping[str, Sequence[int]]) -> dict[Factor, Tensor]:
        return {self[name].factor: _unit_mask(self[name], units) for name, units in kept.items()}

    def _cut_axes(self, factors: Mapping[Factor, Tensor]) -> dict[str, dict[int, Tensor]]:
        found: dict[str, dict[int, Tensor]] = {}
        for name, axes in self._tensors.items():
            for dim, axis in enumerate(axes):
                if any(leaf in factors for leaf in leaves(axis)) and not (mask := kept_mask(axis, factors)).all():
                    found.setdefault(name, {})[dim] = mask
        return found


def _unit_mask(group: Group, units: Sequence[int]) -> Tensor:
    chosen: list[Any] = [int(unit) for unit in units]
    if not chosen:
        raise ValueError(f"group {group.name!r} would be emptied; keep at least one of its {group.size} units")
    if min(chosen) < 0 or max(chosen) >= group.size or len(set(chosen)) != len(chosen):
        raise ValueError(f"group {group.name!r} has units 0 to {group.size - 1}, each once; got {str(chosen)[:80]}")
    mask = torch.zeros(group.size, dtype=torch.bool)
    mask[chosen] = True
    return mask
