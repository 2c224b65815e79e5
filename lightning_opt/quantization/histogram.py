"""Histograms whose bins do not depend on the data, and the ranges that are read from them.

A bin is a sign, an exponent and the first seven bits of a fraction, as in bfloat16: bins are at most 1/128 of their
value wide at every size, two histograms are merged by adding, and a value's bin is a shift of its own bits. Exponents
run from 2**-24 to 2**16; what is smaller counts as 0, what is larger is in the last bin.
"""

import torch
from torch import Tensor

from lightning_opt.quantization.grid import Grid

FRACTION_BITS = 7
LEAST_EXPONENT, MOST_EXPONENT = -24, 16
HALF = (MOST_EXPONENT - LEAST_EXPONENT) << FRACTION_BITS
BINS = 2 * HALF
_SHIFT = 23 - FRACTION_BITS
_FIRST = (127 + LEAST_EXPONENT) << FRACTION_BITS


def add(counts: Tensor, rows: Tensor) -> None:
    """Count the values of `rows` `(n, m)` into `counts` `(n, BINS)`, in place."""
    bits = rows.float().contiguous().view(torch.int32)
    place = ((bits & 0x7FFFFFFF) >> _SHIFT).sub_(_FIRST).clamp_(0, HALF - 1)
    # Negative values count down from the middle, others up, so that bins are in the order of their values.
    place = torch.where(bits < 0, HALF - 1 - place, HALF + place).long()
    counts.scatter_add_(1, place, torch.ones_like(place))


def edges(device: torch.device | None = None) -> Tensor:
    """Return the `(BINS + 1,)` edges of the bins, rising, in float64."""
    place = torch.arange(HALF + 1, dtype=torch.float64, device=device)
    exponent = torch.floor(place / 2**FRACTION_BITS) + LEAST_EXPONENT
    fraction = 1 + (place % 2**FRACTION_BITS) / 2**FRACTION_BITS
    sizes = fraction * torch.exp2(exponent)
    sizes[0] = 0.0  # the first bin holds all that is smaller
    return torch.cat([-sizes.flip(0), sizes[1:]])


def percentiles(counts: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """Return where `(1 - q) / 2` of the values lie below and above, each `(n,)`; values are even within a bin."""
    borders, total = edges(counts.device), counts.sum(dim=1, keepdim=True)
    shares = torch.cumsum(counts, dim=1).double() / total.clamp(min=1)
    shares = torch.nn.functional.pad(shares, (1, 0))
    tail = (1 - q) / 2
    return _at(shares, borders, tail).float(), _at(shares, borders, 1 - tail).float()


def _at(shares: Tensor, borders: Tensor, level: float) -> Tensor:
    wanted = torch.full_like(shares[:, :1], level)
    right = torch.searchsorted(shares, wanted).clamp(1, BINS)
    below, above = shares.gather(1, right - 1), shares.gather(1, right)
    inside = ((wanted - below) / (above - below).clamp(min=1e-300)).clamp(0, 1)
    return (borders[right - 1] + inside * (borders[right] - borders[right - 1])).squeeze(1)


def candidates(low: Tensor, high: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return `steps` ranges from the whole one down to a `steps`th of it, each `(steps, n)`."""
    shares = torch.arange(steps, 0, -1, device=low.device, dtype=low.dtype).unsqueeze(1) / steps
    return shares * low, shares * high


def least_squares(counts: Tensor, low: Tensor, high: Tensor, grid: Grid, steps: int) -> tuple[Tensor, Tensor]:
    """Return the range `(n,)`, `(n,)` with the least expected squared error, values being even within each bin."""
    from lightning_opt.quantization.functional import scale_and_zero_point

    borders = edges(counts.device)
    borders = torch.maximum(torch.minimum(borders, high.double().max()), low.double().min())
    widths = (borders[1:] - borders[:-1]).clamp(min=1e-300)
    density = counts.double() / widths * (borders[1:] > borders[:-1])
    lows, highs = candidates(low, high, steps)
    errors = []
    for least, most in zip(lows, highs, strict=True):
        scale, zero_point = scale_and_zero_point(least, most, grid)
        area = _error_integral(borders.unsqueeze(0), scale.double(), zero_point.double(), grid)
        errors.append((density * (area[:, 1:] - area[:, :-1])).sum(dim=1))
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    return lows.gather(0, best).squeeze(0), highs.gather(0, best).squeeze(0)


def _error_integral(t: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Return an antiderivative at `t` of the squared distance of a value from its grid's nearest value: `(n, m)`."""
    scale = scale.unsqueeze(1)
    first, last = (grid.qmin - zero_point).unsqueeze(1) * scale, (grid.qmax - zero_point).unsqueeze(1) * scale
    inside = torch.minimum(torch.maximum(t, first), last)
    whole = torch.round(inside / scale)
    within = whole * scale**3 / 12 + (inside - whole * scale) ** 3 / 3
    return within + (t - last).clamp(min=0) ** 3 / 3 + (t - first).clamp(max=0) ** 3 / 3


def least_squares_exact(rows: Tensor, grid: Grid, steps: int) -> tuple[Tensor, Tensor]:
    """Return the range `(n,)`, `(n,)` with the least squared error of the values of `rows` `(n, m)` themselves."""
    from lightning_opt.quantization.functional import fake_quantize, scale_and_zero_point

    along = Grid(**{**grid.to_dict(), "axis": 0, "group_size": None})
    low, high = torch.aminmax(rows, dim=1)
    lows, highs = candidates(low.clamp(max=0), high.clamp(min=0), steps)
    best, chosen = torch.full_like(low, torch.inf), torch.zeros_like(low, dtype=torch.int64)
    for place in range(steps):
        rounded = fake_quantize(rows, *scale_and_zero_point(lows[place], highs[place], along), along)
        error = (rounded - rows).square_().sum(dim=1)
        better = error < best
        best, chosen = torch.where(better, error, best), chosen.masked_fill(better, place)
    return lows.gather(0, chosen.unsqueeze(0)).squeeze(0), highs.gather(0, chosen.unsqueeze(0)).squeeze(0)


def least_divergence(counts: Tensor, low: Tensor, high: Tensor, grid: Grid, bins: int) -> tuple[Tensor, Tensor]:
    """Return the range `(n,)`, `(n,)` whose cut and merged histogram of magnitudes is closest to the whole one."""
    reach = torch.maximum(-low, high)
    levels = max((grid.qmax - grid.qmin + 1) // 2 if grid.symmetric or grid.signed else grid.levels, 2)
    shares = torch.stack([_threshold(*pair, bins, levels) for pair in zip(counts, reach.double(), strict=True)])
    limit = (shares * reach.double()).to(low.dtype)
    return torch.maximum(low, -limit), torch.minimum(high, limit)


def _threshold(counts: Tensor, reach: Tensor, bins: int, levels: int) -> Tensor:
    """Return the share of `reach` at which the magnitudes are best cut."""
    cuts = torch.arange(min(levels, bins), bins + 1, max(1, (bins - levels) // 256), device=counts.device)
    divergences = _divergences(_magnitudes(counts, reach, bins), cuts, levels)
    return cuts[divergences.argmin()].double() / bins


def _magnitudes(counts: Tensor, reach: Tensor, bins: int) -> Tensor:
    """Spread the counts of both signs evenly over `bins` equal bins from 0 to `reach`."""
    both = counts[HALF:].double() + counts[:HALF].flip(0).double()
    borders = edges(counts.device)[HALF:]
    above = torch.nn.functional.pad(torch.cumsum(both, 0), (1, 0))
    wanted = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=counts.device) * reach
    right = torch.searchsorted(borders, wanted).clamp(1, HALF)
    share = (wanted - borders[right - 1]) / (borders[right] - borders[right - 1])
    filled = above[right - 1] + share.clamp(0, 1) * (above[right] - above[right - 1])
    filled[-1] = above[-1]
    return filled[1:] - filled[:-1]


def _divergences(sizes: Tensor, cuts: Tensor, levels: int) -> Tensor:
    """Return KL(P || Q) for each cut: P has all beyond in its last bin, Q is merged into `levels` and spread out again.

    Q is the same in all filled bins of a level, so that sums over bins are differences of running sums.
    """
    log = sizes.clamp(min=1e-300).log()
    filled = (sizes > 0).double()
    mass_to, filled_to, own_to = (_running(values) for values in (sizes, filled, sizes * log))
    borders = (torch.arange(levels + 1, device=sizes.device) * cuts.unsqueeze(1) + levels - 1) // levels
    mass, number = mass_to[borders].diff(dim=1), filled_to[borders].diff(dim=1)
    total, kept = mass_to[-1].clamp(min=1e-300), mass_to[cuts].clamp(min=1e-300)
    floor = (1e-6 / cuts).log()  # what Q has ruled out is as unlikely as a millionth of a bin
    log_q = (mass / number.clamp(min=1) / kept.unsqueeze(1)).clamp(min=1e-300).log().maximum(floor.unsqueeze(1))
    beyond, last = mass_to[-1] - kept, cuts - 1
    in_last = sizes[last] + beyond
    of_p = own_to[last] + in_last * in_last.clamp(min=1e-300).log()
    of_q = (mass * log_q).sum(dim=1) + beyond * torch.where(filled[last] > 0, log_q[:, -1], floor)
    return (of_p - of_q) / total - total.log()


def _running(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(torch.cumsum(values, 0), (1, 0))
