"""Blocks of small floats under a power of two (MXFP4, MXFP6, MXFP8): w = level * 2^e.

A power of two leaves little to search: besides the exponent that just holds the largest weight, the one below (which clips it) and the one
above are tried, and the least importance-weighted squared error wins. Sixteen blocks are lanes of one tile, as in `kquants_sym.py`.

Source: OCP Microscaling Formats, section 6.3, for the middle exponent.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import CHUNK, LANES, F, lanes_array, load_tile, tile_place
from fewbit.math.kernels.lanes import float_code, float_level, higher, load, lower, splat, store, where_greater
from fewbit.math.kernels.options import INNER, OUTER

TRIALS = 3
LEAST, MOST = -126, 127  # exponents whose power of two and its inverse are normal float32


@njit(**INNER)
def _power(exponent):
    """2 ** exponent, exactly, for exponents of normal float32."""
    return np.int32((np.int32(exponent) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**INNER)
def _exponents(xt, size, top, out):
    """floor(log2 of the largest weight) - floor(log2 of the largest level) of each lane, 0 for lanes of zeros."""
    zero, most = splat(F(0)), splat(F(0))
    for j in range(0, size * LANES, LANES):
        x = load(xt, j)
        most = higher(most, higher(x, zero - x))
    store(out, 0, most)
    for lane in range(LANES):
        bits = np.int32(F(out[lane]).view(np.int32))
        exponent = (bits >> np.int32(23)) - np.int32(127) - np.int32(top)
        out[lane] = F(min(max(exponent, LEAST + 1), MOST - 1)) if out[lane] > F(0) else F(0)


@njit(**INNER)
def _error(xt, ht, size, scale, inv, high, shift, normal, magic):
    total = splat(F(0))
    for j in range(0, size * LANES, LANES):
        x = load(xt, j)
        away = x - scale * float_level(x * inv, high, shift, normal, magic)
        total = total + load(ht, j) * away * away
    return total


@njit(**OUTER, parallel=True)
def quantize_powers(x, h, size, top, high, shift, normal, magic, lowest, sign_bit, codes, e_out):
    """Quantise blocks of `size` weights, a multiple of 16.

    Args:
        x: float32 [n * size]; h: float32 [period], importance repeating along x (period a multiple of size).
        top: floor(log2 of the largest level); high … sign_bit: the grid, as `lanes.float_code` wants it.
        codes: out, uint8 [n * size]; e_out: out, uint8 [n], exponents plus 127.
    """
    count = x.size // size
    tiles = (count + LANES - 1) // LANES
    for chunk in prange((tiles + CHUNK - 1) // CHUNK):
        xt, ht = lanes_array(size * LANES), lanes_array(size * LANES)
        middle, powers, inverses = lanes_array(LANES), lanes_array(TRIALS * LANES), lanes_array(TRIALS * LANES)
        step, column = lanes_array(LANES), -1
        for tile in range(chunk * CHUNK, min(tiles, chunk * CHUNK + CHUNK)):
            first, place = tile_place(tile, size, count, h.size)
            load_tile(x, x.size, first, count, size, xt)
            if place != column:
                load_tile(h, h.size, first, count, size, ht)
                column = place
            _exponents(xt, size, top, middle)
            for lane in range(LANES):
                for trial in range(TRIALS):
                    exponent = int(middle[lane]) + trial - 1
                    powers[trial * LANES + lane], inverses[trial * LANES + lane] = _power(exponent), _power(-exponent)
            best, chosen = splat(F(np.inf)), splat(F(0))
            for trial in range(TRIALS):
                scale, inv = load(powers, trial * LANES), load(inverses, trial * LANES)
                error = _error(xt, ht, size, scale, inv, high, shift, normal, magic)
                chosen = where_greater(best, error, splat(F(trial - 1)), chosen)
                best = lower(error, best)
            store(step, 0, chosen)
            for lane in range(min(LANES, count - first)):
                exponent = int(middle[lane] + step[lane])
                e_out[first + lane] = np.uint8(exponent + 127)
                by, start = splat(_power(-exponent)), (first + lane) * size
                for j in range(start, start + size, LANES):
                    store(codes, j, float_code(load(x, j) * by, high, shift, normal, magic, lowest, sign_bit))
