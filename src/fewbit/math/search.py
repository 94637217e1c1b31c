"""Choosing scale and shift of one set of blocks whose parameters are stored directly.

    w ~ (level - z) s + v          z: code_shift, v: value_shift; a scheme has at most one of the two

`absmax` puts the extremes of a block on the ends of the grid. `percentile` does so after leaving out a fraction of the largest
weights. `mse` tries a ladder of tighter ranges and keeps the one with the least weighted squared error. `lsq` adds, for each of
them, the closed-form least-squares scale (and shift) for the codes that the range gives: the error is quadratic in (s, v) once the codes
are fixed. Errors are always those of the *stored*, rounded parameters, and the plain range is always among the candidates, so a search is
never worse than no search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fewbit.math import fast
from fewbit.math.rounding import round_levels, store_scale, store_shift
from fewbit.math.tiles import Chunk
from fewbit.num.grid import Codebook, FloatGrid, Grid, IntGrid
from fewbit.num.qtensor import QTensor

Method = Literal["absmax", "minmax", "percentile", "mse", "lsq"]


@dataclass(frozen=True)
class Search:
    """How to choose scales.

    Attributes:
        method: absmax (on a scheme with shifts the same as minmax), percentile, mse or lsq.
        steps: ranges tried by mse and lsq.
        percentile: per cent of the weights of a block that stay inside the range.
        rounds: least-squares passes after the best candidate, and passes over nested scales.
    """

    method: Method = "lsq"
    steps: int = 20
    percentile: float = 99.5
    rounds: int = 2

    @property
    def searches(self) -> bool:
        return self.method in ("mse", "lsq")


@dataclass(frozen=True)
class Target:
    """What the parameters of a block may be.

    Attributes:
        grid: grid of the codes.
        scale: grid that stores the scale, or None when the scale is 1.
        code_shift, value_shift: grids that store the shifts, or None.
        negative: whether a scale may be negative.
        shift_down: whether the value shift may only be <= 0 (unsigned codes under one signed super-scale).
    """

    grid: Grid
    scale: Grid | None
    code_shift: Grid | None = None
    value_shift: Grid | None = None
    negative: bool = False
    shift_down: bool = False


@dataclass(frozen=True)
class Params:
    """Stored parameters of a tensor: plain tensors for leaf schemes, QTensors for nested ones, None where there are none."""

    scale: torch.Tensor | QTensor | None = None
    code_shift: torch.Tensor | QTensor | None = None
    value_shift: torch.Tensor | QTensor | None = None


Triple = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""scale, code_shift, value_shift, each float32 [n, 1, m, 1], representable in storage."""


def choose(target: Target, chunk: Chunk, search: Search) -> Triple:
    """Stored parameters for every block of a chunk."""
    low, high = chunk.extremes()
    if search.method == "percentile":
        low, high = percentile_range(chunk, search.percentile)
    best = from_range(target, low, high)
    if not search.searches:
        return best
    error = error_of(target, chunk, best)
    if search.method == "lsq" and chunk.view is not None and _kernels_serve(target):
        for candidate in fast_candidates(target, chunk.view, low, high, search):
            best, error = _keep_better(target, chunk, candidate, best, error)
        return best
    for candidate in candidates(target, low, high, search):
        best, error = _keep_better(target, chunk, candidate, best, error)
        if search.method == "lsq":
            best, error = _keep_better(target, chunk, least_squares(target, chunk, candidate), best, error)
    if search.method == "lsq":
        for _ in range(search.rounds):
            best, error = _keep_better(target, chunk, least_squares(target, chunk, best), best, error)
    return best


def _kernels_serve(target: Target) -> bool:
    shifted = target.code_shift is not None or target.value_shift is not None
    return fast.serves(target.grid) and (isinstance(target.grid, IntGrid) or not shifted)


def fast_candidates(
    target: Target, view: fast.View, low: torch.Tensor, high: torch.Tensor, search: Search
) -> list[Triple]:
    """The best parameters that the kernels find, rounded to storage."""
    grid, ratios, rounds = target.grid, _ratios(target.grid, search), search.rounds
    if target.scale is None or _bare_exponent(target.scale):
        return candidates(target, low, high, search)
    if target.code_shift is None and target.value_shift is None:
        bases = torch.stack([_base(target, reach, low, high) for reach in _reaches(target)])
        scale = fast.search_scale(view, grid, bases, ratios, rounds)
        return [(_scale(target, scale, bases[0], keep=from_range(target, low, high)[0]), None, None)]
    if not isinstance(grid, IntGrid):  # the kernels know shifts of integer codes only
        return candidates(target, low, high, search)
    if isinstance(target.code_shift, IntGrid):
        near = int(grid.bits <= 4)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale, zero = fast.search_zero(view, grid, low, high, ratios, near, rounds)
        return [(_scale(target, scale, scale), store_shift(target.code_shift, zero), None)]
    if target.shift_down:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale, shift = fast.search_shift(view, grid, low, high, ratios, rounds, target.shift_down)
    scale = _scale(target, scale, scale)
    if target.value_shift is not None:
        return [(scale, None, store_shift(target.value_shift, shift))]
    return [(scale, store_shift(target.code_shift, torch.where(scale == 0, 0, -shift / scale)), None)]


def candidates(target: Target, low: torch.Tensor, high: torch.Tensor, search: Search) -> list[Triple]:
    """Parameters from tighter (and slightly wider) ranges, and with the lopsided end of the grid on either side."""
    found: list[Triple] = []
    if target.scale is not None and _bare_exponent(target.scale):
        plain = from_range(target, low, high)
        return [
            (_scale(target, plain[0] * factor, high - low, keep=plain[0]), plain[1], plain[2])
            for factor in (0.25, 0.5, 2.0)
        ]
    ratios = _ratios(target.grid, search)
    if target.code_shift is None and target.value_shift is None:
        for reach in _reaches(target):
            base = _base(target, reach, low, high)
            found += [(_scale(target, base * ratio, base), None, None) for ratio in ratios]
        return found
    middle, half = (low + high) / 2, (high - low) / 2
    for ratio in ratios:
        scale, shift, offset = from_range(target, middle - half * ratio, middle + half * ratio)
        found.append((scale, shift, offset))
        if shift is not None and isinstance(target.code_shift, IntGrid) and int(target.grid.bits) <= 4:
            found += [(scale, store_shift(target.code_shift, shift + step), None) for step in (-1.0, 1.0)]
    return found


def from_range(target: Target, low: torch.Tensor, high: torch.Tensor) -> Triple:
    """The parameters that put `low` and `high` on the ends of the grid (for a symmetric scheme: the larger of them)."""
    grid = target.grid
    if target.code_shift is None and target.value_shift is None:
        extreme = torch.maximum(low.abs(), high.abs())
        if _one_sided(grid) and target.negative:
            outer = 1.0 if grid.high > 0 else -1.0
            extreme = torch.where(high >= -low, high, low) * outer
        return _scale(target, extreme / _reach(grid), extreme), None, None
    levels = float(grid.high - grid.low)
    if target.value_shift is not None:
        return _from_range_min(target, low, high, levels)
    if isinstance(target.code_shift, IntGrid):
        low, high = low.clamp(max=0), high.clamp(min=0)
    else:  # a float zero point of limited precision must not have to be huge
        slack = (torch.maximum(low.abs(), high.abs()) / 64 - (high - low)).clamp(min=0) / 2
        low, high = low - slack, high + slack
    scale = _scale(target, high / levels - low / levels, high - low)
    shift = torch.where(scale == 0, 0, grid.low - low / torch.where(scale == 0, 1, scale))
    return scale, store_shift(target.code_shift, shift), None


def _from_range_min(target: Target, low: torch.Tensor, high: torch.Tensor, levels: float) -> Triple:
    if target.shift_down:
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = high / levels - low / levels
    scale = _scale(target, span, span)
    # the scale that is really stored may be larger: the shift is taken for the lowest level as stored
    shift = low - target.grid.low * scale
    return scale, None, store_shift(target.value_shift, shift)


def least_squares(target: Target, chunk: Chunk, triple: Triple) -> Triple:
    """The scale (and value shift) that fit best the codes which `triple` gives, rounded to storage."""
    if target.scale is None:
        return triple
    scale, z, v = triple

    def levels(x: torch.Tensor) -> torch.Tensor:
        out = round_levels(target.grid, units(x, triple))
        return out if z is None else out - z

    def weigh(h: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        return y if h is None else h * y

    ll = chunk.total(lambda x, h: weigh(h, levels(x).square_()))
    lx = chunk.total(lambda x, h: weigh(h, levels(x).mul_(x)))
    if v is None:
        fitted = torch.where(ll > 0, lx / torch.where(ll > 0, ll, 1), scale)
        return _scale(target, fitted, scale, keep=scale), z, None
    l1 = chunk.total(lambda x, h: weigh(h, levels(x)))
    x1 = chunk.total(lambda x, h: weigh(h, x))
    h1 = chunk.total(lambda x, h: torch.ones_like(x) if h is None else h.expand(x.shape))
    ll, lx, l1, x1, h1 = (t.double() for t in (ll, lx, l1, x1, h1))
    det = h1 * ll - l1 * l1
    good = det > 1e-12 * h1 * ll
    safe = torch.where(good, det, 1)
    fitted = torch.where(good, (h1 * lx - l1 * x1) / safe, scale.double())
    shift = torch.where(h1 > 0, (x1 - fitted * l1) / torch.where(h1 > 0, h1, 1), v.double())
    if target.shift_down:
        shift = shift.clamp(max=0)
        alone = torch.where(ll > 0, lx / torch.where(ll > 0, ll, 1), fitted)  # with the shift held at 0
        fitted = torch.where(shift == 0, alone, fitted)
    new = _scale(target, fitted.float(), scale, keep=scale)
    return new, None, store_shift(target.value_shift, shift.float())


def units(x: torch.Tensor, triple: Triple) -> torch.Tensor:
    """Weights in units of levels: (x - v) / s + z, and z where the scale is zero."""
    scale, z, v = triple
    out = x if v is None else x - v
    out = torch.where(scale == 0, 0, out / torch.where(scale == 0, 1, scale))
    return out if z is None else out + z


def decode(levels: torch.Tensor, triple: Triple) -> torch.Tensor:
    """(level - z) s + v, in the order of operations of `QTensor.dequantize`."""
    scale, z, v = triple
    out = (levels if z is None else levels - z) * scale
    return out if v is None else out + v


def error_of(target: Target, chunk: Chunk, triple: Triple) -> torch.Tensor:
    """Weighted squared error of each block, [n, 1, m, 1]."""
    if chunk.view is not None and fast.serves(target.grid):
        return fast.errors(chunk.view, target.grid, triple)

    def squared(x: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
        miss = (decode(round_levels(target.grid, units(x, triple)), triple) - x).square_()
        return miss if h is None else miss.mul_(h)

    return chunk.total(squared)


def _keep_better(
    target: Target, chunk: Chunk, new: Triple, best: Triple, error: torch.Tensor
) -> tuple[Triple, torch.Tensor]:
    new_error = error_of(target, chunk, new)
    better = new_error < error
    return merged(better, new, best), torch.where(better, new_error, error)


def merged(better: torch.Tensor, new: Triple, old: Triple) -> Triple:
    """Block by block `new` where `better`, bool [n, 1, m, 1], else `old`; both have the same shifts."""

    def pick(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
        return None if a is None or b is None else torch.where(better, a, b)

    return torch.where(better, new[0], old[0]), pick(new[1], old[1]), pick(new[2], old[2])


def percentile_range(chunk: Chunk, percent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The range that keeps `percent` of the weights of each block, cutting both tails alike."""
    n, br, m, bc = chunk.x.shape
    rows = chunk.x.permute(0, 2, 1, 3).reshape(n, m, br * bc).sort(dim=-1).values
    cut = int((1 - percent / 100) / 2 * (br * bc))
    return rows[..., cut][:, None, :, None], rows[..., br * bc - 1 - cut][:, None, :, None]


def canonical_scale(grid: Grid, scale: Grid) -> float:
    """The scale of an all-zero block: 1, or 0 where the codes have no exact zero."""
    return (
        1.0
        if 0.0 in grid.levels().tolist()
        else max(0.0, float(scale.low) if isinstance(scale, FloatGrid) and not scale.signed else 0.0)
    )


def _scale(target: Target, value: torch.Tensor, extent: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """A scale as it is stored; blocks without extent get the canonical one, forbidden or zero values fall back on `keep`."""
    if target.scale is None:
        return torch.ones_like(value)
    value = torch.where((extent != 0) & (value == 0), torch.finfo(torch.float32).tiny, value)
    if _bare_exponent(target.scale) and keep is None:
        value = (
            value.abs().log2().sub(1e-6).ceil().exp2()
        )  # bare exponents: the next power of two, so that nothing clips
    stored = store_scale(target.scale, value)
    if not target.negative:
        stored = stored.abs() if keep is None else torch.where(stored > 0, stored, keep)
    return torch.where(extent == 0, canonical_scale(target.grid, target.scale), stored)


def _base(target: Target, reach: float | None, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The scale that puts the larger extreme on the plain reach, or the signed one on the level `reach`."""
    if reach is None:
        return torch.maximum(low.abs(), high.abs()) / _reach(target.grid)
    return torch.where(high > -low, high, low) / reach


def _ratios(grid: Grid, search: Search) -> list[float]:
    return torch.linspace(_tightest(grid), 1.05, search.steps).tolist()


def _bare_exponent(grid: Grid) -> bool:
    return isinstance(grid, FloatGrid) and grid.mantissa == 0


def _one_sided(grid: Grid) -> bool:
    return grid.low >= 0 or grid.high <= 0


def _reach(grid: Grid) -> float:
    """The level that the largest magnitude of a block is put on by the plain range."""
    if isinstance(grid, IntGrid):
        return float(grid.high or -grid.low)
    return float(max(abs(grid.low), abs(grid.high)))


def _reaches(target: Target) -> tuple[float | None, ...]:
    """Ends of the grid to search from: None for the plain range, else the level that the signed extreme maps to."""
    grid = target.grid
    if grid.low == -grid.high or not target.negative or (isinstance(grid, IntGrid) and grid.bits > 6 and grid.low < 0):
        return (None,)
    ends = [float(end) for end in (grid.low, grid.high) if end]
    return tuple(ends)


def _tightest(grid: Grid) -> float:
    """Smallest range worth trying, as a fraction of the full one: the fewer levels the tighter."""
    if isinstance(grid, IntGrid):
        return {1: 0.15, 2: 0.25, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.85}[grid.bits]
    if isinstance(grid, Codebook):
        return 0.5 if len(grid.table) > 4 else 0.25
    return 0.5
