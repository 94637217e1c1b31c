"""Symmetric blocks: w = level * scale, the scale in float16 or a small signed integer times a float16 per super-block.

Serves Q3_K, Q6_K, IQ4_XS (nested) and Q4_0, Q5_0, Q8_0, IQ4_NL, TQ1_0, TQ2_0 (direct). Minimises the importance-weighted squared
error of the weights as they will be decoded:

1.  Every block alone: for each candidate that puts the largest weight on (or a little inside or outside) the end of the grid, the nearest
    codes q and the scale that is best for them, sum(h x q) / sum(h q q); the largest sum(h x q)^2 / sum(h q q) wins.
2.  Nested: the super-scale d puts the largest scale on the end of the scale codes; every block takes, of the scale codes around its own,
    the one with the least error; d becomes the least-squares one for these codes; again, as often as asked.
3.  Codes nearest under the stored scales.
4.  A part of what least squares shrinks is given back to the (super-)scale, codes as they are (`kquants_tiles.growth`).

Levels are consecutive integers (`lut` empty) or come from a table: the level nearest to u is lut[int(u * resolution + offset)].
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import (
    CHUNK,
    LANES,
    F,
    growths,
    inverses,
    lanes_array,
    load_tile,
    round_f16,
    share_sums,
    tile_place,
    write_scales,
)
from fewbit.math.kernels.lanes import (
    half,
    higher,
    load,
    lower,
    not_finite,
    rint,
    splat,
    store,
    store_nearest,
    total,
    where_greater,
)
from fewbit.math.kernels.options import INNER, OUTER

# rows of the per-tile scratch array, one float32 per lane each
_SCALE, _INVERSE, _K, _D, _ABOVE, _BELOW, _ENERGY, _AGREED, _GROWTH, _BAD, _PLACE, _LEVEL = (
    16 * row for row in range(12)
)
_ROWS = 12 * 16


@njit(**INNER, inline="always")
def _integer_sums(xt, ht, inv, low, high, size):
    """(sum(h x q), sum(h q q)) as lanes, for the integers nearest to x * inv."""
    a0, b0, a1, b1 = splat(F(0)), splat(F(0)), splat(F(0)), splat(F(0))
    bottom, top = splat(low), splat(high)
    for j in range(0, size * LANES, 2 * LANES):
        x, y = load(xt, j), load(xt, j + LANES)
        q, p = lower(higher(rint(x * inv), bottom), top), lower(higher(rint(y * inv), bottom), top)
        hq, hp = load(ht, j) * q, load(ht, j + LANES) * p
        a0, a1 = a0 + hq * x, a1 + hp * y
        b0, b1 = b0 + hq * q, b1 + hp * p
    return a0 + a1, b0 + b1


@njit(**INNER)
def _table_sums(xt, ht, inv, lut, resolution, offset, size, s):
    """The same for the levels of a table."""
    a, b = splat(F(0)), splat(F(0))
    step, start, zero, top = inv * splat(resolution), splat(offset), splat(F(0)), splat(F(lut.size - 1))
    for j in range(0, size * LANES, LANES):
        x = load(xt, j)
        store(s, _PLACE, lower(higher(x * step + start, zero), top))
        for lane in range(LANES):
            s[_LEVEL + lane] = lut[np.uint32(np.int32(s[_PLACE + lane]))]
        q = load(s, _LEVEL)
        hq = load(ht, j) * q
        a, b = a + hq * x, b + hq * q
    return a, b


@njit(**INNER)
def _ideal(xt, ht, low, high, lut, resolution, offset, size, candidates, polish, s):
    """Step 1: the best scale of every lane on its own."""
    least, most, energy = load(xt, 0), load(xt, 0), splat(F(0))
    for j in range(0, size * LANES, LANES):
        x = load(xt, j)
        least, most, energy = lower(x, least), higher(x, most), energy + load(ht, j) * x * x
    outer = inverses(where_greater(most, splat(F(0)) - least, most, least))
    best, scale, tiny = splat(F(-1)), splat(F(0)), splat(F(1e-37))
    for c in range(candidates.size + polish):
        inv = splat(candidates[c]) * outer if c < candidates.size else inverses(scale)
        if lut.size == 0:
            a, b = _integer_sums(xt, ht, inv, low, high, size)
        else:
            a, b = _table_sums(xt, ht, inv, lut, resolution, offset, size, s)
        found = a / higher(b, tiny)
        gain = a * found
        scale = where_greater(gain, best, found, scale)
        best = higher(gain, best)
    store(s, _SCALE, scale)
    store(s, _ENERGY, energy)
    store(s, _AGREED, best)  # of a least-squares fit this is sum(h x w)
    store(s, _BAD, higher(not_finite(energy), load(s, _BAD)))


@njit(**INNER)
def _nest(xt, ht, low, high, lut, resolution, offset, size, width, k_low, k_high, reach, rounds, s):
    """Step 2: scale codes k of the lanes and super-scales d of groups of `width` lanes, from ideal scales."""
    for first in range(0, LANES, width):
        largest = F(0)
        for lane in range(first, first + width):
            if abs(s[_SCALE + lane]) > abs(largest):
                largest = s[_SCALE + lane]
        for lane in range(first, first + width):
            s[_D + lane] = round_f16(largest / k_low)
    bottom, top = splat(k_low), splat(k_high)
    store(s, _K, lower(higher(rint(load(s, _SCALE) * inverses(load(s, _D))), bottom), top))
    for _ in range(rounds):
        centre, spread = load(s, _K), load(s, _D)
        best, code, code_a, code_b = splat(F(1e30)), centre, splat(F(0)), splat(F(0))
        for step in range(-reach, reach + 1):
            trial = lower(higher(centre + splat(F(step)), bottom), top)
            t = spread * trial
            inv = inverses(t)
            if lut.size == 0:
                a, b = _integer_sums(xt, ht, inv, low, high, size)
            else:
                a, b = _table_sums(xt, ht, inv, lut, resolution, offset, size, s)
            error = t * (t * b - (a + a))
            code = where_greater(best, error, trial, code)
            code_a = where_greater(best, error, a, code_a)
            code_b = where_greater(best, error, b, code_b)
            best = lower(error, best)
        store(s, _K, code)
        store(s, _ABOVE, code_a * code)
        store(s, _BELOW, code_b * code * code)
        for first in range(0, LANES, width):
            above, below = F(0), F(0)
            for lane in range(first, first + width):
                above += s[_ABOVE + lane]
                below += s[_BELOW + lane]
            for lane in range(first, first + width if below > F(0) else first):
                s[_D + lane] = round_f16(above / below)


@njit(**INNER)
def _snap(x, first, blocks, size, low, high, zero, lut, code_lut, resolution, offset, s, codes):
    """Step 3: codes of the blocks of a tile under their stored scales."""
    bottom, most, start_code = splat(low), splat(high), splat(zero)
    top = F(lut.size - 1)
    store(s, _INVERSE, inverses(load(s, _SCALE)))
    for lane in range(blocks):
        start, inv = (first + lane) * size, s[_INVERSE + lane]
        by = splat(inv)
        if lut.size == 0:
            for j in range(start, start + size, LANES):
                store_nearest(codes, j, lower(higher(load(x, j) * by, bottom), most) + start_code)
        else:
            step = inv * resolution
            for j in range(start, start + size):  # in this order NaN gives 0, a place in the table
                codes[j] = code_lut[np.uint32(np.int32(min(max(F(0), x[j] * step + offset), top)))]


@njit(**INNER)
def _unshrink(xt, ht, low, high, lut, resolution, offset, size, width, share, s):
    """Step 4: what the super-scale is multiplied by, for each group of `width` lanes, left in all its lanes."""
    spread = load(s, _SCALE)
    inv = inverses(spread)
    if lut.size == 0:
        a, _ = _integer_sums(xt, ht, inv, low, high, size)
    else:
        a, _ = _table_sums(xt, ht, inv, lut, resolution, offset, size, s)
    store(s, _AGREED, spread * a)
    share_sums(s[_ENERGY : _ENERGY + LANES], width)
    share_sums(s[_AGREED : _AGREED + LANES], width)
    store(s, _GROWTH, growths(load(s, _ENERGY), load(s, _AGREED), share))


@njit(**INNER)
def _write(first, blocks, per_super, s, k_out, d_out):
    """Scale codes and (super-)scales of the blocks of a tile to where they belong."""
    store(s, _D, half(load(s, _GROWTH) * load(s, _D)))
    for lane in range(blocks if per_super > 1 else 0):
        k_out[first + lane] = np.int8(s[_K + lane])
    write_scales(s, _D, first, blocks, per_super, d_out)


@njit(**OUTER, parallel=True)
def quantize_symmetric(
    x, h, size, per_super, low, high, zero, lut, code_lut, resolution, offset, candidates, polish, k_low, k_high, reach, rounds, unbias,
    codes, k_out, d_out,
):  # fmt: skip
    """Quantise blocks of `size` weights, a multiple of 32 or 16.

    Args:
        x: float32 [n * size]; h: float32 [period], importance repeating along x (period a multiple of size).
        per_super: blocks per super-block (1, 8 or 16); 1 means that scales are stored directly.
        low, high: ends of a grid of whole numbers, zero: the code of level 0; lut, code_lut: tables of levels and codes of other grids, else empty.
        candidates: levels that the largest weight of a block is put on; polish: least-squares passes after them.
        k_low, k_high, reach, rounds: range of scale codes, how far around to look, how often.
        unbias: share of the shrinkage that step 4 undoes, 0 to 1.
        codes: out, int8 or uint8 [n * size]; k_out: out, int8 [n] (nested); d_out: out, float32 [n / per_super], representable in float16.

    Returns:
        Whether a weight may be NaN or infinite: nothing that was written counts then. Weights whose squares leave float32 set it too.
    """
    count, wrong = x.size // size, F(0)
    tiles = (count + LANES - 1) // LANES
    for chunk in prange((tiles + CHUNK - 1) // CHUNK):
        xt, ht, s, column = lanes_array(size * LANES), lanes_array(size * LANES), lanes_array(_ROWS), -1
        s[:] = F(0)
        for tile in range(chunk * CHUNK, min(tiles, chunk * CHUNK + CHUNK)):
            first, place = tile_place(tile, size, count, h.size)
            load_tile(x, x.size, first, count, size, xt)
            if place != column:
                load_tile(h, h.size, first, count, size, ht)
                column = place
            _ideal(xt, ht, low, high, lut, resolution, offset, size, candidates, polish, s)
            if per_super > 1:
                _nest(
                    xt, ht, low, high, lut, resolution, offset, size, per_super, k_low, k_high, reach, rounds, s
                )  # fmt: skip
                store(s, _SCALE, load(s, _D) * load(s, _K))
            else:
                store(s, _SCALE, half(load(s, _SCALE)))
                store(s, _D, load(s, _SCALE))
            if per_super > 1 and unbias > F(0):
                _unshrink(xt, ht, low, high, lut, resolution, offset, size, per_super, unbias, s)
            else:
                store(s, _GROWTH, growths(load(s, _ENERGY), load(s, _AGREED), unbias))
            blocks = min(LANES, count - first)
            _write(first, blocks, per_super, s, k_out, d_out)
            _snap(x, first, blocks, size, low, high, zero, lut, code_lut, resolution, offset, s, codes)
        wrong += total(load(s, _BAD))
    return wrong > F(0)
