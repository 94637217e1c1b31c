"""Rounding to a grid: the nearest code for numbers given in units of levels, for every grid.

Ties go to the even code for integers and floats (as IEEE and torch do) and to the lower level for codebooks. Numbers beyond
the grid go to its end. A negative number that rounds to a float grid's zero keeps its sign bit, as in IEEE.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.num.grid import E8M0, Codebook, FloatGrid, Grid, IntGrid, VectorGrid
from fewbit.num.qtensor import NATIVE, code_dtype, decode_codes, level_table, native_dtype

# torch's own casts round to nearest even for these; the rest go through a table of boundaries
_CAST = {"f32", "f16", "bf16", "fp8-e4m3", "fp8-e5m2"}
_BITS_VIEW = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def nearest(grid: Grid, u: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of the levels nearest to `u`.

    Args:
        grid: any grid.
        u: float32 [..., n], in units of levels, finite or infinite; for vector grids n is a multiple of `grid.dim`.
        importance: float32, broadcastable to `u`, >= 0; only vector grids use it (a scalar's nearest level does not depend on it).

    Returns:
        Codes [..., n / dim] of `code_dtype(grid)`.
    """
    if isinstance(grid, IntGrid):
        return u.round().clamp_(grid.low, grid.high).to(code_dtype(grid))
    if isinstance(grid, VectorGrid):
        return _nearest_vectors(grid, u, importance)
    if isinstance(grid, FloatGrid) and grid.name in _CAST:
        return u.clamp(grid.low, grid.high).to(NATIVE[grid.name]).view(_BITS_VIEW[grid.bits])
    if grid == E8M0:
        return _nearest_exponent(u)
    boundaries, order = _boundaries(grid, u.device)
    if isinstance(grid, FloatGrid) and grid.signed:  # magnitude code, then the sign bit
        codes = order[torch.bucketize(u.abs(), boundaries)]
        return codes | (torch.signbit(u).to(torch.uint8) << (grid.bits - 1))
    return order[torch.bucketize(u, boundaries)]


def _nearest_exponent(u: torch.Tensor) -> torch.Tensor:
    """E8M0 codes: the exponent field of a float32, rounded by its fraction; zero and below give the smallest level, 2^-127."""
    bits = u.clamp(min=0.0).contiguous().view(torch.int32)
    code = (bits + 0x3FFFFF + ((bits >> 23) & 1)) >> 23
    code = torch.where(bits < 1 << 23, (bits > 0x600000).to(torch.int32), code)  # 2^-127 is itself subnormal in float32
    return code.clamp_(max=254).to(torch.uint8)


def round_levels(grid: Grid, u: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The levels nearest to `u` as float32, same shape: `decode_codes(grid, nearest(grid, u))` without the codes."""
    if isinstance(grid, IntGrid):
        return u.round().clamp_(grid.low, grid.high)
    if isinstance(grid, FloatGrid) and grid.name in _CAST:
        return u.clamp(grid.low, grid.high).to(NATIVE[grid.name]).float()
    return decode_codes(grid, nearest(grid, u, importance))


def store(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """Values rounded to a leaf grid, still as float32 (see `pack_leaf` for the stored dtype)."""
    return round_levels(grid, values.float())


def store_shift(grid: Grid | None, values: torch.Tensor) -> torch.Tensor | None:
    """Shifts rounded to a leaf grid, as float32; None where the scheme has no such shift."""
    return None if grid is None else store(grid, values)


def store_scale(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """Scales rounded to a leaf grid, as float32: never infinite, and zero only where the value is zero.

    What would underflow becomes the smallest positive level; grids of eight exponent bits stop at the smallest normal number,
    because processors that flush subnormal numbers would read zero.
    """
    stored = store(grid, values)
    if isinstance(grid, FloatGrid):
        floor = grid.smallest_normal if grid.exponent >= 8 else grid.smallest
        stored = torch.where(
            (values != 0) & (stored.abs() < floor), torch.copysign(torch.full_like(stored, floor), values), stored
        )
        return stored if grid.signed else stored.abs()
    return stored


def pack_leaf(grid: Grid, values: torch.Tensor) -> torch.Tensor:
    """Representable float32 values in the dtype that natively holds the grid's levels (float32 where torch has none)."""
    dtype = native_dtype(grid)
    return values if dtype is None else values.to(dtype)


@functools.lru_cache(maxsize=128)
def level_intervals(grid: FloatGrid | Codebook) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The levels of a small grid in order, and where one gives way to the next.

    Returns:
        ends: float32 [n - 1]; u belongs to level i when ends[i-1] < u <= ends[i]. So a tie goes down; where it has to go up (to the
            even code of a float grid) the end is one float32 lower.
        levels: float32 [n], each level once. Signed float grids list their non-negative half.
        codes: uint8 [n], the (first) code of each.
    """
    levels = grid.levels().astype(np.float32).astype(np.float64)  # as they decode; then midpoints are exact
    if isinstance(grid, FloatGrid) and grid.signed:
        levels = levels[: len(levels) // 2]
    finite = np.flatnonzero(np.isfinite(levels))
    order = finite[np.argsort(levels[finite], kind="stable")]
    order = order[np.concatenate([[True], np.diff(levels[order]) > 0])]
    exact = (levels[order][1:] + levels[order][:-1]) / 2
    ends = exact.astype(np.float32)
    ends = np.where(ends > exact, np.nextafter(ends, np.float32(-np.inf)), ends)  # largest float32 <= midpoint
    if isinstance(grid, FloatGrid):
        goes_up = (order[:-1] % 2 == 1) & (ends == exact)
        ends = np.where(goes_up, np.nextafter(ends, np.float32(-np.inf)), ends)
    return ends, levels[order].astype(np.float32), order.astype(np.uint8)


@functools.lru_cache(maxsize=128)
def _boundaries(grid: FloatGrid | Codebook, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ends, _, codes = level_intervals(grid)
    return torch.from_numpy(ends).to(device), torch.from_numpy(codes).to(device)


def _nearest_vectors(grid: VectorGrid, u: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Exact weighted nearest vector: magnitudes by exhaustive search, signs free or of even parity."""
    if u.shape[-1] % grid.dim:
        raise InputError("FB-E0602", f"{grid.name} codes {grid.dim} weights at once, got a row of {u.shape[-1]}")
    flat = u.reshape(-1, grid.dim)
    weight = torch.ones_like(flat) if importance is None else importance.expand(u.shape).reshape(-1, grid.dim)
    rows = max(1, (1 << 22) >> grid.index_bits)  # costs stay near 16 MB a matrix
    codes = [_vector_codes(grid, flat[i : i + rows], weight[i : i + rows]) for i in range(0, flat.shape[0], rows)]
    return torch.cat(codes).reshape(*u.shape[:-1], u.shape[-1] // grid.dim)


def _vector_codes(grid: VectorGrid, u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """u, weight float32 [n, dim] -> int32 [n].

    With signs of even parity and an odd number of negative u, exactly one sign must be wrong (or three, never better); a
    wrong sign at i costs 4 w_i |u_i| m_i, so each part offers its best with and without one.
    """
    table = level_table(grid, u.device)  # [entries, width]
    width = grid.dim // grid.parts
    target = u.abs() if grid.sign_bits else u
    plain, flipped = [], []
    for part in range(grid.parts):
        cut = slice(part * width, (part + 1) * width)
        a, h = target[:, cut], weight[:, cut]
        cost = h @ (table * table).T - 2 * (h * a) @ table.T  # [n, entries], up to a constant
        plain.append(cost.min(-1))
        if grid.sign_bits == grid.dim - 1:
            extra = torch.stack([(h * a)[:, i, None] * table[:, i] for i in range(width)]).min(0)
            best = (cost + 4 * extra.values).min(-1)
            at = torch.gather(extra.indices, 1, best.indices[:, None])[:, 0] + part * width
            flipped.append((best.values, best.indices, at))
    negative = (u < 0) if grid.sign_bits else torch.zeros_like(u, dtype=torch.bool)
    index = torch.stack([p.indices for p in plain])  # [parts, n]
    if flipped:
        odd = negative.sum(-1) % 2 == 1
        total = torch.stack([p.values for p in plain])
        gain = torch.stack([f[0] for f in flipped]) - total  # [parts, n]: price of putting the wrong sign here
        chosen = gain.argmin(0)
        for part, (_, indices, at) in enumerate(flipped):
            here = odd & (chosen == part)
            index[part] = torch.where(here, indices, index[part])
            negative[here, at[here]] ^= True
    code = torch.zeros(u.shape[0], dtype=torch.int64, device=u.device)
    for part in range(grid.parts):
        code |= index[part] << (part * grid.index_bits)
    for bit in range(grid.sign_bits):
        code |= negative[:, bit].long() << (grid.parts * grid.index_bits + bit)
    return code.to(torch.int32)
