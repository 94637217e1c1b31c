"""What the block-scale kernels of ggml's types share: tiles of sixteen blocks as lanes, and float16 rounding.

A search for a block's scale is a loop over candidates of a loop over weights, with a few sums per block. Written one block at a time it
cannot be vectorised well: the sums run across the vector. Here sixteen blocks are transposed into a tile [weights of a block, 16] and
every loop over weights has an innermost loop over 16 lanes with one sum per lane, which the compiler turns into plain vector code.

All arrays are float32; helpers that rely on exact rounding are compiled without fastmath and keep that when they are inlined.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 16
F = np.float32


@njit(nogil=True, cache=True, error_model="numpy")
def round_f16(value):
    """The float16 nearest to a float32, as float32; beyond the largest it stays there, as ggml's scales must be finite."""
    size = abs(value)
    if size >= F(65504.0):
        return F(65504.0) if value > F(0.0) else F(-65504.0)
    if size < F(6.103515625e-05):  # subnormal: multiples of 2^-24
        return np.rint(value * F(16777216.0)) * F(5.9604644775390625e-08)
    shifted = value * F(8193.0)  # Veltkamp: keep 11 significant bits
    return shifted - (shifted - value)


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def load_tile(x, h, h_period, first, count, size, xt, ht):
    """Blocks first … first + 15 (the last one again where there are fewer) as lanes.

    x: [n * size] weights; h: [h_period] importance, repeating every h_period weights; xt, ht: out, [size, 16].
    """
    for lane in range(LANES):
        start = min(first + lane, count - 1) * size
        weight = start % h_period
        for j in range(size):
            xt[j, lane] = x[start + j]
            ht[j, lane] = h[weight + j]


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def inverse(scale):
    """1 / scale, and 0 for a scale of 0."""
    return F(1.0) / scale if scale != F(0.0) else F(0.0)
