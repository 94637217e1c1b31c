"""Blocks with a minimum: w = code * scale + shift, both in float16 or small unsigned codes times one float16 each per super-block.

Serves Q2_K, Q4_K, Q5_K (nested, shift <= 0) and Q4_1, Q5_1 (direct, shift free). Minimises the importance-weighted squared error:

1.  Every block alone: for each candidate range, the nearest codes q, and the (scale, shift) that is best for them, from the two normal
    equations in sum(h q), sum(h q q), sum(h x q); the least error wins, and is polished by the same step from there.
2.  Nested: d and dmin put the largest scale and the lowest shift on or about the highest code, so that the scales and shifts of all blocks lie
    nearest to whole multiples, each weighted by what it would cost; every block looks around its pair of codes for the
    least error; (d, dmin) become the joint least-squares pair for these codes; again, as often as asked.
3.  Codes nearest under the stored scales and shifts.
4.  Least squares shrinks: what the codes stand for is smaller than the weights by the share of their energy that is lost. A part of that is
    given back to (d, dmin), codes as they are (`kquants_tiles.growth`).
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import (
    CHUNK,
    LANES,
    F,
    growths,
    inverse,
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
_H, _HX, _HXX, _SCALE, _SHIFT, _K, _M, _D, _DMIN, _AA, _AB, _BB, _RA, _RB, _GROWTH, _BAD = (
    16 * row for row in range(16)
)
_ROWS = 16 * 16


@njit(**INNER, inline="always")
def _sums(xt, ht, inv, base, top, size):
    """(sum(h q), sum(h q q), sum(h x q)) as lanes, for the codes nearest to x * inv - base."""
    zero, most = splat(F(0)), splat(top)
    sq, sqq, sxq = zero, zero, zero
    sp, spp, syp = zero, zero, zero
    for j in range(0, size * LANES, 2 * LANES):
        x, y = load(xt, j), load(xt, j + LANES)
        q = lower(higher(rint(x * inv - base), zero), most)
        p = lower(higher(rint(y * inv - base), zero), most)
        hq, hp = load(ht, j) * q, load(ht, j + LANES) * p
        sq, sp = sq + hq, sp + hp
        sqq, spp = sqq + hq * q, spp + hp * p
        sxq, syp = sxq + hq * x, syp + hp * y
    return sq + sp, sqq + spp, sxq + syp


@njit(**INNER, inline="always")
def _error(scale, shift, sq, sqq, sxq, h, hx):
    """Weighted squared error without the constant sum(h x x)."""
    two = splat(F(2))
    return scale * (scale * sqq + two * (shift * sq - sxq)) + shift * (shift * h - two * hx)


@njit(**INNER)
def _ideal(xt, ht, top, size, candidates, polish, down, s):
    """Step 1: best scale and shift of every lane on its own; with `down` the shift may not be positive."""
    zero, tiny = splat(F(0)), splat(F(1e-37))
    least, most, h, hx, hxx = load(xt, 0), load(xt, 0), zero, zero, zero
    for j in range(0, size * LANES, LANES):
        x, weight = load(xt, j), load(ht, j)
        least, most = lower(x, least), higher(x, most)
        weighted = weight * x
        h, hx, hxx = h + weight, hx + weighted, hxx + weighted * x
    least = lower(least, zero) if down else least
    spread = most - least
    best, scale, shift, bend = splat(F(1e30)), zero, least, zero
    for c in range(candidates.shape[0] + polish):
        if c < candidates.shape[0]:
            inv = splat(candidates[c, 0]) * inverses(spread)
            low = least + splat(candidates[c, 1]) * spread
            low = lower(low, zero) if down else low
        else:
            inv, low = inverses(scale), shift
        sq, sqq, sxq = _sums(xt, ht, inv, low * inv, top, size)
        det = h * sqq - sq * sq
        free = splat(F(1e-6)) * h * sqq  # below this all codes are alike
        divisor = where_greater(det, free, det, splat(F(1)))
        a = where_greater(det, free, (h * sxq - sq * hx) / divisor, zero)
        b = where_greater(det, free, (sqq * hx - sq * sxq) / divisor, hx / higher(h, tiny))
        if down:
            a = where_greater(b, zero, sxq / higher(sqq, tiny), a)
            b = lower(b, zero)
        error = where_greater(zero, a, splat(F(1e31)), _error(a, b, sq, sqq, sxq, h, hx))
        scale, shift = where_greater(best, error, a, scale), where_greater(best, error, b, shift)
        bend, best = where_greater(best, error, sqq, bend), lower(error, best)
    store(s, _AA, bend)
    store(s, _H, h)
    store(s, _HX, hx)
    store(s, _HXX, hxx)
    store(s, _BAD, higher(not_finite(hx), load(s, _BAD)))
    store(s, _RA, zero - best)  # of a free least-squares fit this is sum(h x w)
    store(s, _SCALE, scale)
    store(s, _SHIFT, shift)


@njit(**INNER)
def _codes_around(xt, ht, top, size, code_top, reach, s):
    """The best pair of codes (k, m) within reach of each lane's own, and the terms of the super-block's normal equations for it."""
    zero, most = splat(F(0)), splat(code_top)
    centre_k, centre_m, d, dmin, h, hx = (
        load(s, _K),
        load(s, _M),
        load(s, _D),
        load(s, _DMIN),
        load(s, _H),
        load(s, _HX),
    )
    best, k, m = splat(F(1e30)), centre_k, centre_m
    bq, bqq, bxq = zero, zero, zero
    for step in range(reach.shape[0]):
        trial_k = lower(higher(centre_k + splat(reach[step, 0]), zero), most)
        trial_m = lower(higher(centre_m + splat(reach[step, 1]), zero), most)
        scale, shift = d * trial_k, dmin * trial_m
        inv = inverses(scale)
        sq, sqq, sxq = _sums(xt, ht, inv, shift * inv, top, size)
        error = _error(scale, shift, sq, sqq, sxq, h, hx)
        k, m = where_greater(best, error, trial_k, k), where_greater(best, error, trial_m, m)
        bq, bqq, bxq = (
            where_greater(best, error, sq, bq),
            where_greater(best, error, sqq, bqq),
            where_greater(best, error, sxq, bxq),
        )
        best = lower(error, best)
    store(s, _K, k)
    store(s, _M, m)
    store(s, _AA, k * k * bqq)
    store(s, _AB, k * m * bq)
    store(s, _BB, m * m * h)
    store(s, _RA, k * bxq)
    store(s, _RB, m * hx)


@njit(**INNER)
def _joint(s, first, width, d, dmin):
    """(d, dmin) of one super-block by least squares, its codes given; as they were where the equations are singular."""
    aa, ab, bb, ra, rb = F(0), F(0), F(0), F(0), F(0)
    for lane in range(first, first + width):
        aa += s[_AA + lane]
        ab += s[_AB + lane]
        bb += s[_BB + lane]
        ra += s[_RA + lane]
        rb += s[_RB + lane]
    det = aa * bb - ab * ab
    if det > F(1e-5) * aa * bb:
        d = round_f16((ra * bb - rb * ab) / det)
        dmin = round_f16((rb - d * ab) / bb)
    elif aa > F(0):
        d = round_f16((ra - ab * dmin) / aa)
    return d, dmin


@njit(**INNER)
def _aligned(s, values, bends, first, width, extreme, top):
    """The multiplier, of some that put `extreme` on or about the highest code, whose multiples lie nearest to all values of a super-block."""
    start, chosen, least = extreme / top, extreme / top, F(np.inf)
    for step in range(12):
        d, total = start * (F(0.9) + F(0.02) * F(step)), F(0)
        by = inverse(d)
        for lane in range(first, first + width):
            away = s[values + lane] - d * min(max(np.rint(s[values + lane] * by), F(0)), top)
            total += s[bends + lane] * away * away
        if total < least:
            least, chosen = total, d
    return round_f16(chosen)


@njit(**INNER)
def _nest(xt, ht, top, size, supers, code_top, reach, rounds, s):
    """Step 2: codes k and m of the lanes, d and dmin (<= 0) of the groups of lanes, left in `s`."""
    width = LANES // supers
    for g in range(supers):
        first, scale, shift = g * width, F(0), F(0)
        for lane in range(first, first + width):
            scale, shift = max(scale, s[_SCALE + lane]), min(shift, s[_SHIFT + lane])
        d = _aligned(s, _SCALE, _AA, first, width, scale, code_top)
        dmin = _aligned(s, _SHIFT, _H, first, width, shift, code_top)
        by, by_min = inverse(d), inverse(dmin)
        for lane in range(first, first + width):
            s[_D + lane], s[_DMIN + lane] = d, dmin
            s[_K + lane] = min(max(np.rint(s[_SCALE + lane] * by), F(0)), code_top)
            s[_M + lane] = min(max(np.rint(s[_SHIFT + lane] * by_min), F(0)), code_top)
    for _ in range(rounds):
        _codes_around(xt, ht, top, size, code_top, reach, s)
        for g in range(supers):
            d, dmin = _joint(s, g * width, width, s[_D + g * width], s[_DMIN + g * width])
            for lane in range(g * width, (g + 1) * width):
                s[_D + lane], s[_DMIN + lane] = d, dmin


@njit(**INNER)
def _snap(x, first, blocks, size, top, s, codes):
    """Step 3: codes of the blocks of a tile under their stored scales and shifts."""
    zero, most = splat(F(0)), splat(top)
    store(s, _AA, inverses(load(s, _SCALE)))
    for lane in range(blocks):
        start, inv, low = (first + lane) * size, splat(s[_AA + lane]), splat(s[_SHIFT + lane])
        for j in range(start, start + size, LANES):
            store_nearest(codes, j, lower(higher((load(x, j) - low) * inv, zero), most))


@njit(**INNER)
def _unshrink(xt, ht, top, size, width, share, s):
    """Step 4: what (d, dmin) are multiplied by, for each group of `width` lanes, left in all its lanes."""
    scale, shift = load(s, _SCALE), load(s, _SHIFT)
    inv = inverses(scale)
    _, _, sxq = _sums(xt, ht, inv, shift * inv, top, size)
    store(s, _RA, scale * sxq + shift * load(s, _HX))
    share_sums(s[_HXX : _HXX + LANES], width)
    share_sums(s[_RA : _RA + LANES], width)
    store(s, _GROWTH, growths(load(s, _HXX), load(s, _RA), share))


@njit(**INNER)
def _settle(xt, ht, top, size, per_super, unbias, s):
    """Scales and shifts of the lanes as they are stored, before step 4, and what step 4 multiplies the stored ones by."""
    if per_super > 1:
        store(s, _SCALE, load(s, _D) * load(s, _K))
        store(s, _SHIFT, load(s, _DMIN) * load(s, _M))
        if unbias > F(0):
            _unshrink(xt, ht, top, size, per_super, unbias, s)
        else:
            store(s, _GROWTH, splat(F(1)))
    else:
        store(s, _D, half(load(s, _SCALE)))
        store(s, _DMIN, half(load(s, _SHIFT)))
        store(s, _SCALE, load(s, _D))
        store(s, _SHIFT, load(s, _DMIN))
        store(s, _GROWTH, growths(load(s, _HXX), load(s, _RA), unbias))


@njit(**INNER)
def _write(first, blocks, per_super, s, k_out, m_out, d_out, dmin_out):
    """Codes of scales and shifts, and super-scales, of the blocks of a tile to where they belong."""
    store(s, _D, half(load(s, _GROWTH) * load(s, _D)))
    store(s, _DMIN, half(load(s, _GROWTH) * load(s, _DMIN)))
    for lane in range(blocks if per_super > 1 else 0):
        k_out[first + lane], m_out[first + lane] = np.uint8(s[_K + lane]), np.uint8(s[_M + lane])
    write_scales(s, _D, first, blocks, per_super, d_out)
    write_scales(s, _DMIN, first, blocks, per_super, dmin_out)


@njit(**OUTER, parallel=True)
def quantize_minimum(
    x,
    h,
    size,
    per_super,
    top,
    candidates,
    polish,
    code_top,
    reach,
    rounds,
    unbias,
    codes,
    k_out,
    m_out,
    d_out,
    dmin_out,
):
    """Quantise blocks of `size` weights, a multiple of 16.

    Args:
        x: float32 [n * size]; h: float32 [period], importance repeating along x (period a multiple of size).
        per_super: blocks per super-block (1, 8 or 16); 1 means that scales and shifts are stored directly, the shift of any sign.
        top: the highest code; code_top: the highest code of a scale or shift.
        candidates: float32 [c, 2]: levels in the range of a block, and where its lower end lies (in ranges above the minimum).
        polish: least-squares passes after them; reach: float32 [r, 2] steps around a block's (scale, shift) codes; rounds: how often.
        unbias: share of the shrinkage that step 4 undoes, 0 to 1.
        codes: out, uint8 [n * size]; k_out, m_out: out, uint8 [n] (nested); d_out, dmin_out: out, float32 [n / per_super], in float16's set.

    Returns:
        Whether a weight may be NaN or infinite: nothing that was written counts then. Weights near the end of float32 set it too.
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
            _ideal(xt, ht, top, size, candidates, polish, per_super > 1, s)
            if per_super > 1:
                _nest(xt, ht, top, size, LANES // per_super, code_top, reach, rounds, s)
            _settle(xt, ht, top, size, per_super, unbias, s)
            blocks = min(LANES, count - first)
            _write(first, blocks, per_super, s, k_out, m_out, d_out, dmin_out)
            _snap(x, first, blocks, size, top, s, codes)
        wrong += total(load(s, _BAD))
    return wrong > F(0)
