"""What a pruner asks of what it prunes: single weights and whole structures answer alike."""

from collections.abc import Mapping
from typing import Any, Protocol

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_opt.pruning.masks import Masks
from lightning_opt.pruning.parts import Layout
from lightning_opt.pruning.statistics import Statistics
from lightning_opt.surgery import Edit


class Plan(Protocol):
    """What is masked in a network, and how it is chosen.

    Attributes:
        root: The network.
        parameters: What masks cover, by name.
        statistics: What the choice reads besides weights.
        total: Parameters of which a share goes, as there were at the start.
        layout: Which parts of the parameters this process holds; None: all of them.
    """

    root: nn.Module
    parameters: dict[str, nn.Parameter]
    statistics: Statistics
    total: int
    layout: Layout | None

    def bind(self, trainer: "pl.Trainer", *, spread: bool) -> None:
        """Take up the parameters that the strategy has put in the place of the network's own.

        Args:
            trainer: Its strategy is set up.
            spread: Whether no process has all weights.
        """

    @property
    def needs(self) -> frozenset[str]:
        """Name the evidence that `choose` reads."""

    def choose(self, fraction: float) -> dict[str, Tensor]:
        """Return the bool masks at a fraction of the final sparsity; all processes call it, and get the same."""

    def exchange(self, masks: Masks, *, progress: float, update: int) -> dict[str, Tensor] | None:
        """Return other masks of the same sparsity; None where nothing is exchanged."""

    def remaining(self, masks: Masks) -> int:
        """Return how many of `total` are neither masked nor gone."""

    def shrink(self, trainer: "pl.Trainer") -> Edit | None:
        """Remove what is masked, and return what was done; None where nothing can be removed."""

    def retire(self) -> None:
        """Mask nothing more: what was masked is gone."""

    def refresh(self) -> None:
        """Look again at the network, to which a checkpoint's recipe may have been applied."""

    def follow(self, edit: Edit) -> None:
        """Take up the new shapes after another pruner has removed structures."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed choice depends on, besides masks and statistics."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
