"""What a pruner chooses where each process holds a part of each weight: what it would choose alone, with all of them.

Single scores stay where they are. What looks at a whole weight (a solver, an exchange, a criterion that is not
elementwise) gets one weight at a time, put together on all processes.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_opt.pruning.allocation import Allocation
from lightning_opt.pruning.criteria.base import Criterion, Evidence
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.oneshot import prune_weight
from lightning_opt.pruning.parts import Layout, local_of
from lightning_opt.pruning.parts_selection import score_part, select_parts
from lightning_opt.pruning.patterns import Pattern
from lightning_opt.pruning.regrow import Regrow
from lightning_opt.pruning.solvers import SlabChooser, SparseGPT
from lightning_opt.pruning.statistics import Statistics


@dataclass(frozen=True)
class SpreadChoice:
    """The rules of a pruner over weights that are spread; all processes must call each method together.

    Attributes:
        parameters: Those that this process has a part of.
        layout: Who holds what.
        statistics: What was observed.
    """

    parameters: Mapping[str, Tensor]
    layout: Layout
    statistics: Statistics
    pattern: Pattern
    criterion: Criterion
    allocation: Allocation
    sparsity: float
    regrow: Regrow | None
    solver: SparseGPT | None
    inputs_first: Collection[str]
    seed: int

    @torch.no_grad()
    def choose(self, fraction: float) -> dict[str, Tensor]:
        """Return the masks of the parts here at a fraction of the final sparsity; a solver also rewrites weights."""
        if self.solver is not None and fraction > 0.0:
            return self._solve(self.solver, fraction)
        scores = {name: score_part(self.criterion, *self._known(name), self.layout) for name in self.layout}
        return select_parts(
            scores,
            self.layout,
            pattern=self.pattern,
            allocation=self.allocation,
            sparsity=self.sparsity,
            fraction=fraction,
            inputs_first=self.inputs_first,
        )

    @torch.no_grad()
    def exchange(self, masks: Masks, *, progress: float, seed: int) -> dict[str, Tensor]:
        """Return masks of the same sparsity in which some weights have changed places."""
        regrow = self.regrow
        assert regrow is not None

        def swap(name: str) -> Tensor:
            _, part, evidence = self._known(name)
            weight, mask = self.layout.whole(name, part), masks.whole(name)
            gradients = {}
            if "gradient" in regrow.needs:
                gradients[name] = self.layout.whole(name, evidence.gradient, dtype=torch.float32)
            new = regrow.swap(
                {name: mask},
                {name: weight},
                gradients,
                progress=progress,
                pattern=self.pattern,
                inputs_first=self.inputs_first,
                seed=seed,
            )
            return new[name]

        return self._one_by_one(swap)

    def _solve(self, solver: SparseGPT, fraction: float) -> dict[str, Tensor]:
        chooser = SlabChooser(self.pattern, fraction * self.sparsity)

        def solve(name: str) -> Tensor:
            _, part, evidence = self._known(name)
            new, mask = prune_weight(self.layout.whole(name, part), evidence, solver, chooser, "layer")
            if part is not None:
                part.copy_(self.layout.part(name, new))
            return mask

        return self._one_by_one(solve)

    def _one_by_one(self, choose: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Choose the mask of one whole weight after the other, and keep the part that belongs here."""
        masks = {}
        for name in self.layout:
            mask = choose(name)
            if name in self.parameters:
                masks[name] = self.layout.part(name, mask)
        return masks

    def _known(self, name: str) -> tuple[str, Tensor | None, Evidence]:
        weight = self.parameters.get(name)
        if weight is None:
            return name, None, Evidence(name=name, seed=self.seed)
        return name, local_of(weight).detach(), self.statistics.evidence(name, self.seed)
