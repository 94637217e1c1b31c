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
)
from fewbit.math.kernels.lanes import half, higher, load, lower, rint, splat, store, where_greater
from fewbit.math.kernels.options import INNER, OUTER


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
def _table_sums(xt, ht, inv, lut, resolution, offset, size, scratch):
    """The same for the levels of a table."""
    a, b = splat(F(0)), splat(F(0))
    step, start, zero, top = inv * splat(resolution), splat(offset), splat(F(0)), splat(F(lut.size - 1))
    for j in range(0, size * LANES, LANES):
        x = load(xt, j)
        store(scratch, 0, lower(higher(x * step + start, zero), top))
        for lane in range(LANES):
            scratch[LANES + lane] = lut[np.uint32(np.int32(scratch[lane]))]
        q = load(scratch, LANES)
        hq = load(ht, j) * q
        a, b = a + hq * x, b + hq * q
    return a, b


@njit(**INNER)
def _ideal(xt, ht, low, high, lut, resolution, offset, size, candidates, polish, scratch):
    """Step 1: the best scale of every lane on its own."""
    least, most = load(xt, 0), load(xt, 0)
    for j in range(LANES, size * LANES, LANES):
        least, most = lower(load(xt, j), least), higher(load(xt, j), most)
    outer = inverses(where_greater(most, splat(F(0)) - least, most, least))
    best, scale, tiny = splat(F(-1)), splat(F(0)), splat(F(1e-37))
    for c in range(candidates.size + polish):
        inv = splat(candidates[c]) * outer if c < candidates.size else inverses(scale)
        if lut.size == 0:
            a, b = _integer_sums(xt, ht, inv, low, high, size)
        else:
            a, b = _table_sums(xt, ht, inv, lut, resolution, offset, size, scratch)
        found = a / higher(b, tiny)
        gain = a * found
        scale = where_greater(gain, best, found, scale)
        best = higher(gain, best)
    return scale


@njit(**INNER)
def _nest(
    xt, ht, low, high, lut, resolution, offset, size, supers, k_low, k_high, reach, rounds, scratch, scale, k, ka, kb, d
):
    """Step 2: scale codes `k` of the lanes and super-scales d of the groups of lanes, from ideal scales in `scale`."""
    width = LANES // supers
    for g in range(supers):
        largest = F(0)
        for lane in range(g * width, (g + 1) * width):
            if abs(scale[lane]) > abs(largest):
                largest = scale[lane]
        d[g] = round_f16(largest / k_low)
        for lane in range(g * width, (g + 1) * width):
            k[lane] = d[g]
    bottom, top = splat(k_low), splat(k_high)
    store(k, 0, lower(higher(rint(load(scale, 0) * inverses(load(k, 0))), bottom), top))
    for _ in range(rounds):
        for lane in range(LANES):
            scale[lane] = d[lane // width]
        centre, spread = load(k, 0), load(scale, 0)
        best, code, code_a, code_b = splat(F(1e30)), centre, splat(F(0)), splat(F(0))
        for step in range(-reach, reach + 1):
            trial = lower(higher(centre + splat(F(step)), bottom), top)
            t = spread * trial
            inv = inverses(t)
            if lut.size == 0:
                a, b = _integer_sums(xt, ht, inv, low, high, size)
            else:
                a, b = _table_sums(xt, ht, inv, lut, resolution, offset, size, scratch)
            error = t * (t * b - (a + a))
            code = where_greater(best, error, trial, code)
            code_a = where_greater(best, error, a, code_a)
            code_b = where_greater(best, error, b, code_b)
            best = lower(error, best)
        store(k, 0, code)
        store(ka, 0, code_a * code)
        store(kb, 0, code_b * code * code)
        for g in range(supers):
            above, below = F(0), F(0)
            for lane in range(g * width, (g + 1) * width):
                above += ka[lane]
                below += kb[lane]
            if below > F(0):
                d[g] = round_f16(above / below)


@njit(**INNER)
def _snap(x, first, blocks, size, inverted, low, high, zero, lut, code_lut, resolution, offset, codes):
    """Step 3: codes of the blocks of a tile under their stored scales, given as 1 / scale."""
    bottom, most, start_code = splat(low), splat(high), splat(zero)
    top = F(lut.size - 1)
    for lane in range(blocks):
        start, inv = (first + lane) * size, inverted[lane]
        by = splat(inv)
        if lut.size == 0:
            for j in range(start, start + size, LANES):
                store(codes, j, lower(higher(rint(load(x, j) * by), bottom), most) + start_code)
        else:
            step = inv * resolution
            for j in range(start, start + size):
                codes[j] = code_lut[np.uint32(np.int32(min(max(x[j] * step + offset, F(0)), top)))]


@njit(**INNER)
def _unshrink(xt, ht, low, high, lut, resolution, offset, size, width, share, scratch, scale, energies, agreements, by):
    """Step 4: what the super-scale is multiplied by, for each group of `width` lanes, left in `by` for all its lanes."""
    spread, energy = load(scale, 0), splat(F(0))
    inv = inverses(spread)
    if lut.size == 0:
        a, _ = _integer_sums(xt, ht, inv, low, high, size)
    else:
        a, _ = _table_sums(xt, ht, inv, lut, resolution, offset, size, scratch)
    for j in range(0, size * LANES, LANES):
        x = load(xt, j)
        energy = energy + load(ht, j) * x * x
    store(energies, 0, energy)
    store(agreements, 0, spread * a)
    share_sums(energies, width)
    share_sums(agreements, width)
    store(by, 0, growths(load(energies, 0), load(agreements, 0), share))


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
    """
    count = x.size // size
    tiles = (count + LANES - 1) // LANES
    for chunk in prange((tiles + CHUNK - 1) // CHUNK):
        xt, ht, scratch = lanes_array(size * LANES), lanes_array(size * LANES), lanes_array(2 * LANES)
        scale, k, ka, kb = lanes_array(LANES), lanes_array(LANES), lanes_array(LANES), lanes_array(LANES)
        d, by, column = lanes_array(LANES), lanes_array(LANES), -1
        for tile in range(chunk * CHUNK, min(tiles, chunk * CHUNK + CHUNK)):
            first, place = tile_place(tile, size, count, h.size)
            load_tile(x, x.size, first, count, size, xt)
            if place != column:
                load_tile(h, h.size, first, count, size, ht)
                column = place
            store(scale, 0, _ideal(xt, ht, low, high, lut, resolution, offset, size, candidates, polish, scratch))
            if per_super > 1:
                _nest(
                    xt, ht, low, high, lut, resolution, offset, size, LANES // per_super, k_low, k_high, reach, rounds,
                    scratch, scale, k, ka, kb, d,
                )  # fmt: skip
                for lane in range(LANES):
                    scale[lane] = d[lane // per_super] * k[lane]
            else:
                store(scale, 0, half(load(scale, 0)))
                store(d, 0, load(scale, 0))
            by[:] = F(1)
            if unbias > F(0):
                _unshrink(
                    xt, ht, low, high, lut, resolution, offset, size, per_super, unbias, scratch, scale, ka, kb, by
                )  # fmt: skip
            blocks = min(LANES, count - first)
            for lane in range(blocks if per_super > 1 else 0):
                k_out[first + lane] = np.int8(k[lane])
                ka[lane // per_super] = by[lane] * d[lane // per_super]
            if per_super == 1:
                store(ka, 0, load(by, 0) * load(d, 0))
            store(ka, 0, half(load(ka, 0)))
            d_out[first // per_super : (first + blocks) // per_super] = ka[: blocks // per_super]
            store(kb, 0, inverses(load(scale, 0)))
            _snap(x, first, blocks, size, kb, low, high, zero, lut, code_lut, resolution, offset, codes)
