"""Blocks with a minimum: w = code * scale + shift, both in float16 or small unsigned codes times one float16 each per super-block.

Serves Q2_K, Q4_K, Q5_K (nested, shift <= 0) and Q4_1, Q5_1 (direct, shift free). Minimises the importance-weighted squared error:

1.  Every block alone: for each candidate range, the nearest codes q, and the (scale, shift) that is best for them, from the two normal
    equations in sum(h q), sum(h q q), sum(h x q); the least error wins, and is polished by the same step from there.
2.  Nested: d and dmin put the largest scale and the lowest shift on the highest code; every block looks around its pair of codes for the
    least error; (d, dmin) become the joint least-squares pair for these codes; again, as often as asked.
3.  Codes nearest under the stored scales and shifts.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import LANES, F, inverse, load_tile, round_f16

# rows of the per-tile scratch array, one float32 per lane each
(
    _H,
    _HX,
    _HXX,
    _SQ,
    _SQQ,
    _SXQ,
    _INV,
    _LOW,
    _BEST,
    _SCALE,
    _SHIFT,
    _K,
    _M,
    _KC,
    _MC,
    _MIN,
    _RANGE,
    _BQ,
    _BQQ,
    _BXQ,
    _D,
    _DMIN,
) = range(22)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _sums(xt, hx, ht, top, size, s):
    """sum(h q), sum(h q q), sum(h x q) per lane for the codes nearest to (x - low) * inv."""
    inv, low, sq, sqq, sxq = s[_INV], s[_LOW], s[_SQ], s[_SQQ], s[_SXQ]
    for lane in range(LANES):
        sq[lane] = F(0.0)
        sqq[lane] = F(0.0)
        sxq[lane] = F(0.0)
    for j in range(0, size, 4):  # four at a time: the sums go through memory, their chains must be short
        for lane in range(LANES):
            q0 = min(max(np.rint((xt[j, lane] - low[lane]) * inv[lane]), F(0.0)), top)
            q1 = min(max(np.rint((xt[j + 1, lane] - low[lane]) * inv[lane]), F(0.0)), top)
            q2 = min(max(np.rint((xt[j + 2, lane] - low[lane]) * inv[lane]), F(0.0)), top)
            q3 = min(max(np.rint((xt[j + 3, lane] - low[lane]) * inv[lane]), F(0.0)), top)
            p0, p1, p2, p3 = ht[j, lane] * q0, ht[j + 1, lane] * q1, ht[j + 2, lane] * q2, ht[j + 3, lane] * q3
            sq[lane] += p0 + p1 + p2 + p3
            sqq[lane] += p0 * q0 + p1 * q1 + p2 * q2 + p3 * q3
            sxq[lane] += hx[j, lane] * q0 + hx[j + 1, lane] * q1 + hx[j + 2, lane] * q2 + hx[j + 3, lane] * q3


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _least_squares(s, down):
    """Keep the best (scale, shift) for the codes just summed where it beats what the lane has."""
    for lane in range(LANES):
        h, hx, sq, sqq, sxq = s[_H, lane], s[_HX, lane], s[_SQ, lane], s[_SQQ, lane], s[_SXQ, lane]
        det = h * sqq - sq * sq
        free = det > F(1e-7) * h * sqq
        safe = det if free else F(1.0)
        scale = (h * sxq - sq * hx) / safe if free else F(0.0)
        shift = (sqq * hx - sq * sxq) / safe if free else hx / max(h, F(1e-38))
        clamped = down and shift > F(0.0)
        shift = F(0.0) if clamped else shift
        scale = sxq / max(sqq, F(1e-38)) if clamped else scale
        error = scale * (scale * sqq + F(2.0) * (shift * sq - sxq)) + shift * (shift * h - F(2.0) * hx)
        better = error < s[_BEST, lane] and scale >= F(0.0)
        s[_BEST, lane] = error if better else s[_BEST, lane]
        s[_SCALE, lane] = scale if better else s[_SCALE, lane]
        s[_SHIFT, lane] = shift if better else s[_SHIFT, lane]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _ideal(xt, hx, ht, top, size, candidates, polish, down, s):
    """Step 1."""
    total, total_x, low, high = s[_H], s[_HX], s[_MIN], s[_RANGE]
    for lane in range(LANES):
        total[lane], total_x[lane], low[lane], high[lane] = F(0.0), F(0.0), F(0.0) if down else xt[0, lane], xt[0, lane]
    for j in range(size):
        for lane in range(LANES):
            low[lane], high[lane] = min(low[lane], xt[j, lane]), max(high[lane], xt[j, lane])
            total[lane] += ht[j, lane]
            total_x[lane] += hx[j, lane]
    for lane in range(LANES):
        high[lane] = max(high[lane] - low[lane], F(0.0))  # from here on the range
        s[_BEST, lane], s[_SCALE, lane], s[_SHIFT, lane] = F(np.inf), F(0.0), low[lane]
    for c in range(candidates.shape[0]):
        for lane in range(LANES):
            s[_INV, lane] = candidates[c, 0] * inverse(s[_RANGE, lane])
            s[_LOW, lane] = s[_MIN, lane] + candidates[c, 1] * s[_RANGE, lane]
            s[_LOW, lane] = min(s[_LOW, lane], F(0.0)) if down else s[_LOW, lane]
        _sums(xt, hx, ht, top, size, s)
        _least_squares(s, down)
    for _ in range(polish):
        for lane in range(LANES):
            s[_INV, lane], s[_LOW, lane] = inverse(s[_SCALE, lane]), s[_SHIFT, lane]
        _sums(xt, hx, ht, top, size, s)
        _least_squares(s, down)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _try_codes(xt, hx, ht, top, size, code_top, k_step, m_step, s):
    """Error of every lane with scale and shift codes a step away from their centres; kept where it is the least so far."""
    for lane in range(LANES):
        k = min(max(s[_KC, lane] + k_step, F(0.0)), code_top)
        m = min(max(s[_MC, lane] + m_step, F(0.0)), code_top)
        s[_INV, lane] = inverse(s[_D, lane] * k)
        s[_LOW, lane] = s[_DMIN, lane] * m
    _sums(xt, hx, ht, top, size, s)
    for lane in range(LANES):
        k = min(max(s[_KC, lane] + k_step, F(0.0)), code_top)
        m = min(max(s[_MC, lane] + m_step, F(0.0)), code_top)
        scale, shift = s[_D, lane] * k, s[_DMIN, lane] * m
        sq, sqq, sxq = s[_SQ, lane], s[_SQQ, lane], s[_SXQ, lane]
        error = scale * (scale * sqq + F(2.0) * (shift * sq - sxq)) + shift * (
            shift * s[_H, lane] - F(2.0) * s[_HX, lane]
        )
        better = error < s[_BEST, lane]
        s[_BEST, lane] = error if better else s[_BEST, lane]
        s[_K, lane] = k if better else s[_K, lane]
        s[_M, lane] = m if better else s[_M, lane]
        s[_BQ, lane] = sq if better else s[_BQ, lane]
        s[_BQQ, lane] = sqq if better else s[_BQQ, lane]
        s[_BXQ, lane] = sxq if better else s[_BXQ, lane]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _joint(s, first, width, d, dmin, g):
    """(d, dmin) of one super-block by least squares, its codes given; unchanged where the equations are singular."""
    aa, ab, bb, ra, rb = F(0.0), F(0.0), F(0.0), F(0.0), F(0.0)
    for lane in range(first, first + width):
        k, m = s[_K, lane], s[_M, lane]
        aa += k * k * s[_BQQ, lane]
        ab += k * m * s[_BQ, lane]
        bb += m * m * s[_H, lane]
        ra += k * s[_BXQ, lane]
        rb += m * s[_HX, lane]
        s[_KC, lane], s[_MC, lane] = k, m
    det = aa * bb - ab * ab
    if det > F(1e-5) * aa * bb:
        d[g] = round_f16((ra * bb - rb * ab) / det)
        dmin[g] = round_f16((rb - d[g] * ab) / bb)
    elif aa > F(0.0):
        d[g] = round_f16((ra - ab * dmin[g]) / aa)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _nest(xt, hx, ht, top, size, supers, code_top, reach, rounds, d, dmin, s):
    """Step 2: codes k and m of the lanes, d and dmin (<= 0) of the groups of lanes."""
    width = LANES // supers
    for g in range(supers):
        scale, shift = F(0.0), F(0.0)
        for lane in range(g * width, (g + 1) * width):
            scale, shift = max(scale, s[_SCALE, lane]), min(shift, s[_SHIFT, lane])
        d[g], dmin[g] = round_f16(scale / code_top), round_f16(shift / code_top)
        for lane in range(g * width, (g + 1) * width):
            s[_KC, lane] = min(max(np.rint(s[_SCALE, lane] * inverse(d[g])), F(0.0)), code_top)
            s[_MC, lane] = min(max(np.rint(s[_SHIFT, lane] * inverse(dmin[g])), F(0.0)), code_top)
    for _ in range(rounds):
        for lane in range(LANES):
            s[_BEST, lane], s[_D, lane], s[_DMIN, lane] = F(np.inf), d[lane // width], dmin[lane // width]
        _try_codes(xt, hx, ht, top, size, code_top, F(0.0), F(0.0), s)
        for step in range(reach.shape[0]):
            _try_codes(xt, hx, ht, top, size, code_top, reach[step, 0], reach[step, 1], s)
        for g in range(supers):
            _joint(s, g * width, width, d, dmin, g)


@njit(nogil=True, cache=True, error_model="numpy", parallel=True, fastmath=True)
def quantize_minimum(
    x, h, size, per_super, top, candidates, polish, code_top, reach, rounds, codes, k_out, m_out, d_out, dmin_out
):
    """Quantise blocks of `size` weights.

    Args:
        x: float32 [n * size]; h: float32 [period], importance repeating along x (period a multiple of size).
        per_super: blocks per super-block (1, 8 or 16); 1 means that scales and shifts are stored directly, the shift of any sign.
        top: the highest code; code_top: the highest code of a scale or shift.
        candidates: float32 [c, 2]: levels in the range of a block, and where its lower end lies (in ranges above the minimum).
        polish: least-squares passes after them; reach: float32 [r, 2] steps around a block's (scale, shift) codes; rounds: how often.
        codes: out, uint8 [n * size]; k_out, m_out: out, uint8 [n] (nested); d_out, dmin_out: out, float32 [n / per_super], in float16's set.
    """
    count = x.size // size
    tiles = (count + LANES - 1) // LANES
    for chunk in prange((tiles + 15) // 16):
        xt, ht, hx = (
            np.empty((size, LANES), np.float32),
            np.empty((size, LANES), np.float32),
            np.empty((size, LANES), np.float32),
        )
        s = np.zeros((22, LANES), np.float32)
        d, dmin = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for tile in range(chunk * 16, min(tiles, chunk * 16 + 16)):
            first = tile * LANES
            load_tile(x, h, h.size, first, count, size, xt, ht)
            for j in range(size):
                for lane in range(LANES):
                    hx[j, lane] = ht[j, lane] * xt[j, lane]
            _ideal(xt, hx, ht, top, size, candidates, polish, per_super > 1, s)
            if per_super > 1:
                _nest(xt, hx, ht, top, size, LANES // per_super, code_top, reach, rounds, d, dmin, s)
            for lane in range(min(LANES, count - first)):
                block = first + lane
                if per_super > 1:
                    group = lane // per_super
                    scale, shift = d[group] * s[_K, lane], dmin[group] * s[_M, lane]
                    k_out[block], m_out[block] = np.uint8(s[_K, lane]), np.uint8(s[_M, lane])
                    d_out[block // per_super], dmin_out[block // per_super] = d[group], dmin[group]
                else:
                    scale, shift = round_f16(s[_SCALE, lane]), round_f16(s[_SHIFT, lane])
                    d_out[block], dmin_out[block] = scale, shift
                inv = inverse(scale)
                for j in range(block * size, (block + 1) * size):
                    codes[j] = np.uint8(min(max(np.rint((x[j] - shift) * inv), F(0.0)), top))
