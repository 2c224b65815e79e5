"""Which single weights, n:m groups, blocks, rows or columns a pruner masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_opt.callbacks.prune_target import choose_weights
from lightning_opt.errors import ConfigError
from lightning_opt.pruning.allocation import Allocation
from lightning_opt.pruning.criteria import Criterion
from lightning_opt.pruning.inputs import EmbeddingReader, reader_for
from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.oneshot import prune_weight
from lightning_opt.pruning.parts import Layout
from lightning_opt.pruning.parts_choice import SpreadChoice
from lightning_opt.pruning.patterns import Pattern, inputs_first
from lightning_opt.pruning.regrow import Regrow
from lightning_opt.pruning.selection import select
from lightning_opt.pruning.solvers import SlabChooser, SparseGPT
from lightning_opt.pruning.statistics import Statistics
from lightning_opt.surgery import Edit
from lightning_opt.surgery.shrink import Shrink, cut

_OF_INPUTS = frozenset({"input_norm", "gram", "output_norm"})


class WeightPlan:
    """Masks over the weights of a network.

    Args:
        root: The network.
        pattern: The units that are kept or removed.
        criterion: Scores each weight.
        allocation: Shares the sparsity among the tensors.
        sparsity: In the end, of the named weights as they were at the start.
        regrow: Exchanges weights while the sparsity stands still.
        solver: Rewrites the weights that stay; it then chooses them as well, and each layer loses the same share.
        include: Names of weights, see `choose_weights`.
        exclude: Likewise.
        seed: For criteria that draw.

    Raises:
        ConfigError: Names match nothing, or the pattern does not fit a weight.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        pattern: Pattern,
        criterion: Criterion,
        allocation: Allocation,
        sparsity: float,
        regrow: Regrow | None,
        solver: SparseGPT | None,
        include: Sequence[str],
        exclude: Sequence[str],
        seed: int,
    ) -> None:
        self.root, self.pattern, self.criterion, self.allocation = root, pattern, criterion, allocation
        self.sparsity, self.regrow, self.solver, self.seed = sparsity, regrow, solver, seed
        self.parameters = choose_weights(root, pattern=pattern, include=include, exclude=exclude)
        self.total = sum(weight.numel() for weight in self.parameters.values())
        self._turned = inputs_first(root).intersection(self.parameters)
        self._names = tuple(self.parameters)
        self.layout: Layout | None = None
        self._trainer: pl.Trainer | None = None
        self._observe()
        self._try()

    @property
    def needs(self) -> frozenset[str]:
        """Name the evidence that `choose` reads."""
        return (self.solver or self.criterion).needs

    def bind(self, trainer: "pl.Trainer", *, spread: bool) -> None:
        """Take up the parameters that the strategy has put in the place of the network's own."""
        self._trainer = trainer if spread else None
        if not spread:
            return
        named = dict(self.root.named_parameters())
        self.parameters = {name: named[name] for name in self._names if name in named}
        self.layout = Layout.of(self.parameters, order=self._names)
        self._observe()

    def _observe(self) -> None:
        self.statistics = Statistics.of(self.root, self.parameters, self.criterion, layout=self.layout)
        needs = self.needs | (self.regrow.needs if self.regrow is not None else frozenset())
        if needs != self.statistics.needs:
            pull = self.statistics.pull
            self.statistics = Statistics(self.root, self.parameters, needs, pull=pull, layout=self.layout)

    def _try(self) -> None:
        """Refuse before training what could not be done at its end."""
        unread = [name for name in self.parameters if not self._has_inputs(name)]
        if self.needs & _OF_INPUTS and unread:
            raise ConfigError(
                f"{type(self.solver or self.criterion).__name__} reads the inputs of layers, which {unread[0]} does "
                f"not have or show; leave it dense with exclude=[{unread[0]}]"
            )
        try:
            self._select({name: weight.detach().abs() for name, weight in self.parameters.items()}, 1.0)
        except ValueError as error:
            raise ConfigError(f"sparsity={self.sparsity}, allocation={self.allocation}: {error}") from error

    def _has_inputs(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        reader = reader_for(self.root.get_submodule(path), leaf)
        return reader is not None and not (self.solver is not None and isinstance(reader, EmbeddingReader))

    @torch.no_grad()
    def choose(self, fraction: float) -> dict[str, Tensor]:
        """Return the bool masks at a fraction of the final sparsity; a solver also rewrites the weights.

        Every process must call it at the same time: the first one's choice counts.
        """
        if self.layout is not None:
            return self._parts(self.layout).choose(fraction)
        if self.solver is not None and fraction > 0.0:
            return self._solve(fraction)
        scores = {
            name: self.criterion.score(weight.detach(), self.statistics.evidence(name, self.seed))
            for name, weight in self.parameters.items()
        }
        return agree(self._select(scores, fraction))

    def _select(self, scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
        return select(
            scores,
            pattern=self.pattern,
            allocation=self.allocation,
            sparsity=self.sparsity,
            fraction=fraction,
            inputs_first=self._turned,
        )

    def exchange(self, masks: Masks, *, progress: float, update: int) -> dict[str, Tensor] | None:
        """Return masks of the same sparsity in which some weights have changed places; None without a `regrow`."""
        if self.regrow is None:
            return None
        if self.layout is not None:
            return self._parts(self.layout).exchange(masks, progress=progress, seed=self.seed + update)
        gradients = {name: self.statistics.evidence(name).gradient for name in self.parameters}
        new = self.regrow.swap(
            masks.as_dict(),
            self.parameters,
            {name: gradient for name, gradient in gradients.items() if gradient is not None},
            progress=progress,
            pattern=self.pattern,
            inputs_first=self._turned,
            seed=self.seed + update,
        )
        return agree(new)

    def _solve(self, fraction: float) -> dict[str, Tensor]:
        assert self.solver is not None
        chooser = SlabChooser(self.pattern, fraction * self.sparsity)
        masks = {}
        for name, weight in self.parameters.items():
            evidence = self.statistics.evidence(name, self.seed)
            new, masks[name] = prune_weight(weight.detach(), evidence, self.solver, chooser, "layer")
            weight.copy_(agree({name: new})[name])
        return agree(masks)

    def _parts(self, layout: Layout) -> SpreadChoice:
        return SpreadChoice(
            self.parameters,
            layout,
            self.statistics,
            pattern=self.pattern,
            criterion=self.criterion,
            allocation=self.allocation,
            sparsity=self.sparsity,
            regrow=self.regrow,
            solver=self.solver,
            inputs_first=self._turned,
            seed=self.seed,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed choice depends on, besides statistics and masks: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""

    def follow(self, edit: Edit) -> None:
        """Take up the new shapes after another pruner has removed structures; what gradients told goes on."""
        told = self.statistics.state_dict(everywhere=True)
        if self._trainer is not None:
            self.bind(self._trainer, spread=True)
        self.refresh()
        if isinstance(edit, Shrink):
            sums = {field: tensors for field, tensors in told["sums"].items() if field not in _OF_INPUTS}
            cuts = {
                field: {n: cut(t, edit.kept[n]) if n in edit.kept else t for n, t in tensors.items()}
                for field, tensors in sums.items()
            }
            self.statistics.load_state_dict({**told, "sums": cuts})

    def refresh(self) -> None:
        """Take up the shapes of a network to which a checkpoint's recipe was applied."""
        shapes = [weight.shape for weight in self.parameters.values()]
        if self.layout is not None:
            shapes = [self.layout[name].shape for name in self.layout]
        self.total = sum(shape.numel() for shape in shapes)
        self._observe()

    def remaining(self, masks: Masks) -> int:
        """Return how many of the named weights are not masked."""
        return round((1.0 - masks.sparsity()) * self.total)

    def shrink(self, trainer: "pl.Trainer") -> Edit | None:
        """Remove nothing: single weights have no place that could be left out."""
        return None

    def retire(self) -> None:
        """Keep what is masked."""


def agree(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the first process's tensors on all of them; alone, what was given."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not tensors:
        return dict(tensors)
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in map(Tensor.contiguous, tensors.values())])
    torch.distributed.broadcast(flat, src=0)
    parts = flat.split([tensor.numel() * tensor.element_size() for tensor in tensors.values()])
    pairs = zip(tensors.items(), parts, strict=True)
    return {name: part.clone().view(tensor.dtype).view(tensor.shape) for (name, tensor), part in pairs}
