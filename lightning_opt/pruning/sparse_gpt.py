"""Solvers: prune a trained layer at once and rewrite what is left so that its outputs change least."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_opt.pruning.inverse import inverse_factor
from lightning_opt.pruning.patterns import NM, Pattern

# From scores `(rows, columns)` of a slab of a layer to a bool mask of the same shape, True = keep.
MaskChooser: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SlabChooser:
    """Choose within a slab of columns what a pattern wants.

    Attributes:
        pattern: Element, N:M or blocks.
        sparsity: Share of the slab that goes, in [0, 1); a pattern with a density of its own does not read it.

    Raises:
        ValueError: The sparsity is out of range.
    """

    pattern: Pattern
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be at least 0 and less than 1, not {self.sparsity}")

    @property
    def columns(self) -> int | None:
        """Columns that are chosen together: the M of N:M; None: a whole block of the solver's."""
        return self.pattern.m if isinstance(self.pattern, NM) else None

    def __call__(self, scores: Tensor) -> Tensor:
        self.pattern.check("this layer", scores.shape)
        units, fixed = self.pattern.pool(scores), self.pattern.density is not None
        kept = (
            self.pattern.keep(units, 1.0) if fixed else keep_largest(units, round((1.0 - self.sparsity) * len(units)))
        )
        return self.pattern.expand(kept, scores.shape)


@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column; after each, correct the columns that are still to come.

    Frantar, Alistarh (2023), "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    arXiv 2301.00774, algorithm 1. The error of a pruned weight is spread over the later columns by the inverse of
    `H = X^T X + damping * mean(diag) * I`, kept as its upper Cholesky factor U (equation 4 and section 3.3). Within a
    block of columns the elements with the least `w^2 / U_jj^2` go (section 3.4); for N:M the choice is made every M
    columns.

    Args:
        damping: Share of the mean of H's diagonal that is added to it; raised tenfold as long as H has no factor.
        block_size: Columns that are corrected, and chosen, together.

    Raises:
        ValueError: An argument is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    compares: ClassVar[str] = "layer"

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if not self.damping > 0.0:
            raise ValueError(f"damping must be more than 0, not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    @torch.no_grad()
    def solve(self, weight: Tensor, gram: Tensor, mask_chooser: MaskChooser) -> tuple[Tensor, Tensor]:
        """Return the pruned and corrected weight, and its mask.

        Args:
            weight: `(out, in)`; not changed.
            gram: `X^T X` of the layer's inputs, `(in, in)`, on any scale.
            mask_chooser: From scores `(out, columns)` to a bool mask, True = keep. Where it has an attribute `columns`,
                it is asked for that many columns at a time, else for a whole block.

        Returns:
            The new weight (the weight's dtype, exact zeros where the mask is False) and the mask, `(out, in)` bool.

        Raises:
            ValueError: The shapes do not fit, or the chooser's columns do not divide the block size.
        """
        if weight.dim() != 2 or gram.shape != (weight.shape[1],) * 2:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} does not fit a gram of {tuple(gram.shape)}")
        together = getattr(mask_chooser, "columns", None) or self.block_size
        if self.block_size % together and together < weight.shape[1]:
            raise ValueError(
                f"block_size must be a multiple of the pattern's {together} columns, not {self.block_size}"
            )
        factor, alive = inverse_factor(gram[None], self.damping)[0], gram.diagonal() > 0
        work = weight.detach().float().clone()
        mask = torch.ones_like(work, dtype=torch.bool)
        for start in range(0, work.shape[1], self.block_size):
            block = slice(start, min(start + self.block_size, work.shape[1]))
            errors = _solve_block(
                work[:, block], mask[:, block], factor[block, block], alive[block], mask_chooser, together
            )
            work[:, block.stop :] -= errors @ factor[block, block.stop :]
        return (work * mask).to(weight.dtype), mask


def _solve_block(
    work: Tensor, mask: Tensor, factor: Tensor, alive: Tensor, choose: MaskChooser, together: int
) -> Tensor:
    """Solve one block in place; return each column's error, `(out, columns)`."""
    errors = torch.zeros_like(work)
    scale = factor.diagonal()
    for j in range(work.shape[1]):
        if j % together == 0:
            slab = slice(j, min(j + together, work.shape[1]))
            # An input that was never seen costs nothing to cut.
            mask[:, slab] = choose((work[:, slab] / scale[slab]).square() * alive[slab])
        errors[:, j] = work[:, j] * ~mask[:, j] / scale[j]
        work[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
    return errors


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Return a bool mask of the `count` largest along the last axis; equal scores go by position, first kept."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, order[..., :count], True)
