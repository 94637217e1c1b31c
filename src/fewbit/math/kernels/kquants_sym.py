"""Symmetric blocks: w = level * scale, the scale in float16 or a small signed integer times a float16 per super-block.

Serves Q3_K, Q6_K, IQ4_XS (nested) and Q4_0, Q5_0, Q8_0, IQ4_NL, TQ1_0, TQ2_0 (direct). Minimises the importance-weighted squared
error of the weights as they will be decoded:

1.  Every block alone: for each candidate that puts the largest weight on (or a little inside or outside) the end of the grid, the nearest
    codes q and the scale that is best for them, sum(h x q) / sum(h q q); the largest sum(h x q)^2 / sum(h q q) wins.
2.  Nested: the super-scale d puts the largest scale on the end of the scale codes; every block takes, of the scale codes around its own,
    the one with the least error; d becomes the least-squares one for these codes; again, as often as asked.
3.  Codes nearest under the stored scales.

Levels are consecutive integers (`lut` empty) or come from a table: the level nearest to u is lut[int(u * resolution + offset)].
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import LANES, F, inverse, load_tile, round_f16


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _sums(xt, hx, ht, inv, low, high, lut, resolution, offset, size, a, b):
    """a = sum(h x q), b = sum(h q q) per lane for the codes nearest to x * inv."""
    for lane in range(LANES):
        a[lane] = F(0.0)
        b[lane] = F(0.0)
    if lut.size == 0:
        for j in range(0, size, 4):  # four at a time: the sums go through memory, their chains must be short
            for lane in range(LANES):
                q0 = min(max(np.rint(xt[j, lane] * inv[lane]), low), high)
                q1 = min(max(np.rint(xt[j + 1, lane] * inv[lane]), low), high)
                q2 = min(max(np.rint(xt[j + 2, lane] * inv[lane]), low), high)
                q3 = min(max(np.rint(xt[j + 3, lane] * inv[lane]), low), high)
                a[lane] += hx[j, lane] * q0 + hx[j + 1, lane] * q1 + hx[j + 2, lane] * q2 + hx[j + 3, lane] * q3
                b[lane] += (
                    ht[j, lane] * q0 * q0
                    + ht[j + 1, lane] * q1 * q1
                    + ht[j + 2, lane] * q2 * q2
                    + ht[j + 3, lane] * q3 * q3
                )
    else:
        top = F(lut.size - 1)
        for j in range(0, size, 2):
            for lane in range(LANES):
                i0 = np.uint32(np.int32(min(max(xt[j, lane] * inv[lane] * resolution + offset, F(0.0)), top)))
                i1 = np.uint32(np.int32(min(max(xt[j + 1, lane] * inv[lane] * resolution + offset, F(0.0)), top)))
                q0, q1 = lut[i0], lut[i1]
                a[lane] += hx[j, lane] * q0 + hx[j + 1, lane] * q1
                b[lane] += ht[j, lane] * q0 * q0 + ht[j + 1, lane] * q1 * q1


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _ideal(xt, hx, ht, low, high, lut, resolution, offset, size, candidates, polish, inv, a, b, best, scale):
    """Step 1: the best scale of every lane on its own."""
    for lane in range(LANES):
        a[lane] = xt[0, lane]
        b[lane] = xt[0, lane]
        best[lane] = F(-1.0)
    for j in range(1, size):
        for lane in range(LANES):
            a[lane] = min(a[lane], xt[j, lane])
            b[lane] = max(b[lane], xt[j, lane])
    for lane in range(LANES):
        scale[lane] = inverse(b[lane] if b[lane] > -a[lane] else a[lane])  # for now: its inverse
    trial = np.empty(LANES, np.float32)
    for lane in range(LANES):
        trial[lane] = F(0.0)
    for c in range(candidates.size):
        for lane in range(LANES):
            inv[lane] = candidates[c] * scale[lane]
        _sums(xt, hx, ht, inv, low, high, lut, resolution, offset, size, a, b)
        for lane in range(LANES):
            found = a[lane] / max(b[lane], F(1e-38))
            gain = a[lane] * found
            better = gain > best[lane]
            best[lane] = gain if better else best[lane]
            trial[lane] = found if better else trial[lane]
    for lane in range(LANES):
        scale[lane] = trial[lane]
    for _ in range(polish):
        for lane in range(LANES):
            inv[lane] = inverse(scale[lane])
        _sums(xt, hx, ht, inv, low, high, lut, resolution, offset, size, a, b)
        for lane in range(LANES):
            found = a[lane] / max(b[lane], F(1e-38))
            gain = a[lane] * found
            better = gain > best[lane]
            best[lane] = gain if better else best[lane]
            scale[lane] = found if better else scale[lane]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _nest(
    xt,
    hx,
    ht,
    low,
    high,
    lut,
    resolution,
    offset,
    size,
    supers,
    k_low,
    k_high,
    reach,
    rounds,
    inv,
    a,
    b,
    best,
    scale,
    k,
    d,
):
    """Step 2: scale codes k of the lanes and super-scales d of the groups of lanes."""
    width = LANES // supers
    ka, kb, centre = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    spread = np.empty(LANES, np.float32)
    for g in range(supers):
        largest = F(0.0)
        for lane in range(g * width, (g + 1) * width):
            if abs(scale[lane]) > abs(largest):
                largest = scale[lane]
        d[g] = round_f16(largest / k_low)
        for lane in range(g * width, (g + 1) * width):
            centre[lane] = min(max(np.rint(scale[lane] * inverse(d[g])), k_low), k_high)
    for _ in range(rounds):
        for lane in range(LANES):
            best[lane] = F(np.inf)
            spread[lane] = d[lane // width]
        for step in range(-reach, reach + 1):
            for lane in range(LANES):
                inv[lane] = inverse(spread[lane] * min(max(centre[lane] + F(step), k_low), k_high))
            _sums(xt, hx, ht, inv, low, high, lut, resolution, offset, size, a, b)
            for lane in range(LANES):
                code = min(max(centre[lane] + F(step), k_low), k_high)
                t = spread[lane] * code
                error = t * (t * b[lane] - F(2.0) * a[lane])
                better = error < best[lane]
                best[lane] = error if better else best[lane]
                k[lane] = code if better else k[lane]
                ka[lane] = a[lane] if better else ka[lane]
                kb[lane] = b[lane] if better else kb[lane]
        for g in range(supers):
            top, bottom = F(0.0), F(0.0)
            for lane in range(g * width, (g + 1) * width):
                top += k[lane] * ka[lane]
                bottom += k[lane] * k[lane] * kb[lane]
                centre[lane] = k[lane]
            if bottom > F(0.0):
                d[g] = round_f16(top / bottom)


@njit(nogil=True, cache=True, error_model="numpy", parallel=True, fastmath=True)
def quantize_symmetric(
    x,
    h,
    size,
    per_super,
    low,
    high,
    lut,
    code_lut,
    resolution,
    offset,
    candidates,
    polish,
    k_low,
    k_high,
    reach,
    rounds,
    codes,
    k_out,
    d_out,
):
    """Quantise blocks of `size` weights.

    Args:
        x: float32 [n * size]; h: float32 [period], importance repeating along x (period a multiple of size).
        per_super: blocks per super-block (1, 8 or 16); 1 means that scales are stored directly.
        low, high: ends of an integer grid; lut, code_lut: tables of levels and codes of other grids, else empty.
        candidates: levels that the largest weight of a block is put on; polish: least-squares passes after them.
        k_low, k_high, reach, rounds: range of scale codes, how far around to look, how often.
        codes: out, int8 or uint8 [n * size]; k_out: out, int8 [n] (nested); d_out: out, float32 [n / per_super], representable in float16.
    """
    count = x.size // size
    tiles = (count + LANES - 1) // LANES
    for chunk in prange((tiles + 15) // 16):
        xt, ht, hx = (
            np.empty((size, LANES), np.float32),
            np.empty((size, LANES), np.float32),
            np.empty((size, LANES), np.float32),
        )
        inv, a, b = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        best, scale, k = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        d = np.empty(LANES, np.float32)
        for tile in range(chunk * 16, min(tiles, chunk * 16 + 16)):
            first = tile * LANES
            load_tile(x, h, h.size, first, count, size, xt, ht)
            for j in range(size):
                for lane in range(LANES):
                    hx[j, lane] = ht[j, lane] * xt[j, lane]
            _ideal(xt, hx, ht, low, high, lut, resolution, offset, size, candidates, polish, inv, a, b, best, scale)
            if per_super > 1:
                supers = LANES // per_super
                _nest(
                    xt,
                    hx,
                    ht,
                    low,
                    high,
                    lut,
                    resolution,
                    offset,
                    size,
                    supers,
                    k_low,
                    k_high,
                    reach,
                    rounds,
                    inv,
                    a,
                    b,
                    best,
                    scale,
                    k,
                    d,
                )
            for lane in range(min(LANES, count - first)):
                block = first + lane
                if per_super > 1:
                    stored = d[lane // per_super] * k[lane]
                    k_out[block] = np.int8(k[lane])
                    if block % per_super == 0:
                        d_out[block // per_super] = d[lane // per_super]
                else:
                    stored = round_f16(scale[lane])
                    d_out[block] = stored
                _snap(x, block * size, size, inverse(stored), low, high, lut, code_lut, resolution, offset, codes)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=True, inline="always")
def _snap(x, start, size, inv, low, high, lut, code_lut, resolution, offset, codes):
    """Step 3 for one block."""
    if lut.size == 0:
        for j in range(start, start + size):
            codes[j] = np.int8(min(max(np.rint(x[j] * inv), low), high))
    else:
        top = F(lut.size - 1)
        for j in range(start, start + size):
            codes[j] = code_lut[np.uint32(min(max(x[j] * inv * resolution + offset, F(0.0)), top))]
