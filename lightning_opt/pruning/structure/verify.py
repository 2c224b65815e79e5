"""The check that the model's own code follows a cut: trace the smaller model again, and compare it with the masked one.

Numbers in a module's code that no attribute holds, and attributes that are used in ways that the walk cannot see, show
here: as an error, as a shape other than the one that the structure foretells, or as another output than that of the
model with the same units zeroed. The groups that are to blame are frozen, with the operation and the module as reason.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs, forward, map_inputs
from lightning_opt.pruning.structure.axes import Reason, freeze, leaves
from lightning_opt.pruning.structure.groups import Group
from lightning_opt.pruning.structure.program import evaluating, export, tensors_of, without_cache
from lightning_opt.pruning.structure.provenance import tracking
from lightning_opt.pruning.structure.structure import Structure
from lightning_opt.pruning.structure.units import kept_count
from lightning_opt.pruning.structure.walk import Shapes, shapes_of

_TOLERANCE, _TOLERANCE_SINGLE = 1e-4, 1e-2  # of the largest output, in float64 and else


@dataclass(frozen=True)
class Finding:
    """What went wrong: in which operation or module, for which of the groups."""

    reason: Reason
    suspects: list[Group]


class Verifier:
    """Cuts some units of each group of a copy of the model, and finds out which groups the model cannot follow.

    Args:
        model: The model, which is not changed.
        example_inputs: What it was traced with.
        shapes: Every operation of its program with the axes of its results.
    """

    def __init__(self, model: nn.Module, example_inputs: Inputs, shapes: Shapes) -> None:
        self.model, self.inputs, self.shapes = model, example_inputs, shapes

    def freeze_unfollowed(self, find: Callable[[], Structure]) -> Structure:
        """Return the structure without the groups that the model's code cannot follow.

        Args:
            find: Returns the structure as it is with what is frozen by now.
        """
        structure = find()
        while structure.groups and (finding := self._check(structure)) is not None:
            for group in finding.suspects:
                freeze([group.factor], finding.reason)
            structure = find()
        return structure

    def _check(self, structure: Structure) -> Finding | None:
        finding = self._runs(structure, structure.groups)
        if finding is not None:
            guilty = [group for group in finding.suspects if self._runs(structure, [group]) is not None]
            return Finding(finding.reason, guilty or finding.suspects)
        return self._keeps_shapes(structure) or self._equals_masked(structure)

    def _runs(self, structure: Structure, groups: Sequence[Group]) -> Finding | None:
        """Run the smaller model; on an error suspect the groups of the module that raised it."""
        small = copy.deepcopy(self.model)
        stack = [""]
        try:
            structure.edit(_some(groups)).apply(small)
            with evaluating(small), without_cache(small), tracking(small, stack), torch.no_grad():
                forward(small, self.inputs)
        except Exception as error:  # the model's own code says that it cannot work with this size
            why = f"cannot change, the model's code fails ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
            inside = [group for group in groups if _is_in(group, stack[-1])]
            return Finding(Reason(why, stack[-1] or "the model"), inside or list(groups))
        return None

    def _keeps_shapes(self, structure: Structure) -> Finding | None:
        """Trace the smaller model; suspect the groups whose axes have another size than foretold."""
        small = copy.deepcopy(self.model)
        kept = _some(structure.groups)
        structure.edit(kept).apply(small)
        try:
            actual = shapes_of(export(small, self.inputs))
        except ConfigError as error:
            return Finding(Reason(f"cannot change ({error})"), list(structure.groups))
        by_name = {group.name: group for group in structure.groups}
        counts = {by_name[name].factor: len(units) for name, units in kept.items()}
        if [name for name, _, _ in actual] != [name for name, _, _ in self.shapes]:
            return None  # the code took another path; the outputs decide
        for (name, module, axes), (_, _, sizes) in zip(self.shapes, actual, strict=True):
            wrong = {
                leaf
                for tensor, shape in zip(axes, sizes, strict=True)
                for axis, size in zip(tensor, shape, strict=True)
                if kept_count(axis, counts) != size
                for leaf in leaves(axis)
            }
            if wrong:
                why = "has a size in the model's code that no attribute holds"
                suspects = [group for group in structure.groups if group.factor in wrong]
                reason = Reason(why, f"{name} in {module or 'the model'}")
                return Finding(reason, suspects or list(structure.groups))
        return None

    def _equals_masked(self, structure: Structure) -> Finding | None:
        """Compare with the model whose units are zeroed, where that must be the same."""
        exact = [group for group in structure.groups if group.exact]
        if not exact or self._differs(structure, exact) is False:
            return None
        guilty = [group for group in exact if self._differs(structure, [group])]
        why = "gives another output when it is cut than when it is zeroed"
        return Finding(Reason(why), guilty or exact)

    def _differs(self, structure: Structure, groups: Sequence[Group]) -> bool:
        kept = _some(groups)
        masked = _lively(self.model).to(self._dtype)
        small = copy.deepcopy(masked)
        structure.edit(kept).apply(small)
        parameters = dict(masked.named_parameters())
        with torch.no_grad():
            for name, mask in structure.masks(kept).items():
                parameters[name].mul_(mask.to(parameters[name].device))
        pairs = zip(self._outputs(small), self._outputs(masked), strict=True)
        return any(_far(a, b) for a, b in pairs if a.is_floating_point())

    @cached_property
    def _dtype(self) -> torch.dtype | None:
        """Return float64, or None (what the model has) where an operation of the model is not there in float64."""
        try:
            self._outputs(copy.deepcopy(self.model).double())
        except Exception:  # kernels say in many ways that they lack a type
            return None
        return torch.float64

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        double = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) is torch.float64
        inputs = map_inputs(self.inputs, lambda x: x.double() if double and x.is_floating_point() else x)
        with evaluating(model), without_cache(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tensors_of(forward(model, inputs))


def _far(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.isfinite().all() != b.isfinite().all():
        return True
    tolerance = _TOLERANCE if a.dtype is torch.float64 else _TOLERANCE_SINGLE
    return bool(((a - b).abs() > tolerance * b.abs().max().clamp(min=1e-12)).any()) if b.numel() else False


def _some(groups: Sequence[Group]) -> dict[str, list[int]]:
    """Keep another number of units of each group, so that two whose numbers are tied in the code show."""
    dropped = {group.name: 1 + place % max(group.size // 2, 1) for place, group in enumerate(groups)}
    return {group.name: list(range(dropped[group.name], group.size)) for group in groups}


def _lively(model: nn.Module) -> nn.Module:
    """Return a copy with random weights: as they are, attention may be flat and residual branches silent."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() > 1:
            parameter.data = noise.mul_((len(parameter) / parameter.numel()) ** 0.5)
        else:
            parameter.data = parameter.data + 0.3 * noise
    return model


def _is_in(group: Group, module: str) -> bool:
    return any(not module or f"{member.tensor}.".startswith(f"{module}.") for member in group.members)
