"""GPTQ: round a layer's weights column by column, and correct the columns that are still to come."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_opt.errors import ConfigError
from lightning_opt.forward import Inputs
from lightning_opt.pruning.inverse import inverse_factor
from lightning_opt.quantization.improvement import Outcome, QuantizedImprovement
from lightning_opt.quantization.layerwise import Stage, inputs_of, stages
from lightning_opt.quantization.rounding import Lattice
from lightning_opt.quantization.targets import Target, outcome, targets_in

# From the weights of one run of columns `(G, O, width)` as they are by then to their scale and zero point, `(G, O)`.
Refit: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def solve(
    weight: Tensor,
    gram: Tensor,
    lattice: Lattice,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    refit: Refit | None = None,
) -> tuple[Tensor, Lattice]:
    """Round a layer's weights; each column's error is spread over the columns behind it.

    Frantar, Ashkboos, Hoefler, Alistarh (2022), "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", arXiv 2210.17323, algorithm 1: with `H = X^T X + damping * mean(diag) * I` and U the upper Cholesky
    factor of its inverse, column j leaves the error `(w_j - quant(w_j)) / U_jj`, and row j of U says how much of it
    every later column takes back (equations 2 and 3, section 3.3 step 3).

    Weights that are exactly 0, as pruning leaves them, stay 0.

    Args:
        weight: `(G, O, I)`; not changed.
        gram: `X^T X` of the inputs of each group, `(G, I, I)`, on any scale.
        lattice: Where weights may lie.
        damping: Share of the mean of H's diagonal that is added to it; raised tenfold where H has no factor.
        block_size: Columns whose corrections of the columns behind them are applied together.
        act_order: Take the inputs of the largest sums of squares first. Runs of columns keep their scales and places.
        refit: Fits the scales of a run anew when its turn comes, to the corrected weights; not with `act_order`.

    Returns:
        The weights on the lattice, `(G, O, I)` float32, and the lattice, with the scales that were fitted anew.

    Raises:
        ValueError: The shapes do not fit, the Gram matrix has no Cholesky factor, or `act_order` meets `refit`.
    """
    groups, _, inputs = weight.shape
    if gram.shape != (groups, inputs, inputs):
        raise ValueError(f"weights of shape {tuple(weight.shape)} do not fit a gram of {tuple(gram.shape)}")
    if act_order and refit is not None:
        raise ValueError("act_order takes columns out of the order of their runs; it cannot refit the scales of runs")
    order = _order(gram, act_order)
    work = weight.detach().float().take_along_dim(order[:, None], dim=-1)
    kept = work != 0
    factor = inverse_factor(_permuted(gram, order), damping)
    rounded = torch.empty_like(work)
    if refit is not None:  # a run that is fitted anew must be corrected up to its last column
        block_size = lattice.width * max(1, block_size // lattice.width)
    for start in range(0, inputs, block_size):
        block = slice(start, min(start + block_size, inputs))
        errors = torch.empty_like(work[..., block])
        for j in range(block.start, block.stop):
            if refit is not None and j % lattice.width == 0:
                lattice = lattice.with_run(j // lattice.width, *refit(work[..., j : j + lattice.width]))
            rounded[..., j] = lattice.nearest_in(work[..., j], order[:, j] // lattice.width) * kept[..., j]
            errors[..., j - start] = (work[..., j] - rounded[..., j]) / factor[:, j, j, None]
            spread = errors[..., j - start, None] * factor[:, None, j, j + 1 : block.stop]
            work[..., j + 1 : block.stop] -= spread
        work[..., block.stop :] -= errors @ factor[:, block, block.stop :]
    return rounded.take_along_dim(order.argsort(dim=-1)[:, None], dim=-1), lattice


@dataclass(frozen=True, kw_only=True)
class GPTQ(QuantizedImprovement):
    """Round the weights of layer after layer with `solve`, each on what the layers before it give after theirs.

    Frantar et al. (2022), arXiv 2210.17323. For linear layers, convolutions (as the product with unfolded inputs that
    they are) and transformers' `Conv1D`, with one scale for each output or for each group of its inputs. Groups are
    fitted anew, to the corrected weights, when their turn comes, unless `act_order` takes inputs out of their order.

    Args:
        damping: Share of the mean of the diagonal of `X^T X` that is added to it.
        block_size: Columns that are corrected together; it changes speed, not results (but for rounding).
        act_order: Take the inputs of the largest sums of squares first.
        exclude: Patterns (`fnmatch`) of full names of layers to leave alone.

    Raises:
        ValueError: An argument is out of range.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = True
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.damping > 0.0:
            raise ValueError(f"damping must be more than 0, not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    @torch.no_grad()
    def improve(self, model: nn.Module, batches: Sequence[Inputs], *, reference: nn.Module | None = None) -> Outcome:
        targets, refused = targets_in(model, exclude=self.exclude, by="GPTQ")
        visited = stages(model, list(targets), batches[0])
        for stage in visited:
            for path, gram in _grams(model, stage, targets, batches).items():
                self._rewrite(targets[path], gram)
        return outcome(targets, visited, refused)

    def _rewrite(self, target: Target, gram: Tensor) -> None:
        lattice, refit = target.lattice(), None
        if target.quantizer.grid.group_size is not None and not self.act_order:
            refit = target.refit
        try:
            rows, lattice = solve(
                target.rows(),
                gram,
                lattice,
                damping=self.damping,
                block_size=self.block_size,
                act_order=self.act_order,
                refit=refit,
            )
        except ValueError as error:
            raise ConfigError(f"GPTQ cannot solve layer {target.path}: {error}") from error
        target.write(rows, lattice)


def _grams(
    model: nn.Module, stage: Stage, targets: Mapping[str, Target], batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """Return `X^T X`, `(G, I, I)` float64, of each layer of a stage."""
    found: dict[str, Tensor] = {}
    for batch in batches:
        for path, given in inputs_of(model, stage, batch).items():
            for x in given:
                for rows in targets[path].read(x):
                    product = (rows.mT @ rows).double()
                    found[path] = found[path] + product if path in found else product
    return found


def _order(gram: Tensor, act_order: bool) -> Tensor:
    if not act_order:
        return torch.arange(gram.shape[-1], device=gram.device).expand(gram.shape[0], -1)
    return gram.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    return gram.take_along_dim(order[:, :, None], dim=1).take_along_dim(order[:, None, :], dim=2)
