"""Histograms of magnitudes, and the range that a fixed scale should cover.

A bin is the first 16 bits of the float32 pattern of |x| (sign aside): eight bits of exponent and eight of mantissa, so each is 1/256 to 1/512 of
its value wide. The bins are the same for every tensor, so histograms of batches, shards and resumed runs simply add up, whatever their
ranges, and the sum does not depend on the order: counts are whole numbers.

    percentile   the magnitude below which a share of all inputs lies, to within one bin
    mse          of a ladder of ranges the one under which the inputs are rounded and clipped with the least squared error
"""

from __future__ import annotations

import torch

from fewbit.base.errors import InputError
from fewbit.math.rounding import round_levels
from fewbit.num.grid import Grid

BINS = 1 << 16
CHUNK = 1 << 22  # entries that are sorted into bins at a time
_SHIFT = 15  # bits of a float32 that a bin leaves open; the sign bit is 0
STEPS = 60  # ranges that `mse` tries
TIGHTEST = 1 / 16  # the smallest of them, as a share of the largest input


def magnitudes(x: torch.Tensor) -> torch.Tensor:
    """float64 [BINS]: how many entries of a finite tensor fall into each bin of magnitude."""
    found = torch.zeros(BINS, dtype=torch.float64, device=x.device)
    for part in x.detach().reshape(-1).split(CHUNK):
        bits = part.float().abs().view(torch.int32) >> _SHIFT
        found += torch.bincount(bits, minlength=BINS)
    return found


def centres(device: torch.device | str = "cpu") -> torch.Tensor:
    """float64 [BINS]: the middle of each bin; bins of infinities and NaN count as infinite."""
    low = (torch.arange(BINS, device=device, dtype=torch.int32) << _SHIFT).view(torch.float32).double()
    high = ((torch.arange(BINS, device=device, dtype=torch.int32) << _SHIFT) + (1 << _SHIFT)).view(torch.float32)
    middle = (low + high.double()) / 2
    return torch.where(torch.isfinite(middle), middle, torch.inf)


def percentile(histogram: torch.Tensor, percent: float) -> float:
    """The upper end of the bin under which `percent` of all entries lie: at most 1/256 above the true percentile of the magnitudes.

    Raises:
        InputError: FB-E0706 for a percentage outside (0, 100] or a histogram without entries.
    """
    total = float(histogram.sum())
    if not 0 < percent <= 100 or not total > 0:
        raise InputError("FB-E0706", f"no {percent:g}-th percentile of {total:g} inputs")
    wanted = percent / 100 * total * (1 - 1e-12)  # a share that is a whole number of inputs, found as such
    index = int(torch.searchsorted(histogram.cumsum(0), torch.tensor(wanted, dtype=torch.float64).to(histogram.device)))
    index = min(index, BINS - 1)
    return float(((torch.tensor(index, dtype=torch.int32) << _SHIFT) + (1 << _SHIFT) - 1).view(torch.float32))


def least_error(histogram: torch.Tensor, grid: Grid, largest: float) -> float:
    """The range r, at most `largest`, for which rounding the inputs to levels times r / grid.high loses least.

    Args:
        histogram: float64 [BINS], of magnitudes.
        grid: of the activations; negative inputs are taken to be rounded as positive ones are.
        largest: the largest magnitude; itself always among the ranges that are tried, so the answer never loses more.
    """
    seen = histogram.nonzero()[:, 0]
    x, count = centres(histogram.device)[seen], histogram[seen]
    x = x.clamp(max=largest)
    best, least = largest, float("inf")
    for step in range(STEPS):
        reach = largest * TIGHTEST ** (step / (STEPS - 1))
        scale = reach / float(grid.high)
        back = round_levels(grid, (x / scale).float()).double() * scale
        loss = float((count * (x - back).square()).sum())
        if loss < least:
            best, least = reach, loss
    return best
