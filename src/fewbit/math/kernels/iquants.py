"""Vector-coded super-blocks (ggml's i-quants): w = sign * magnitude vector * scale, the scale an odd number times a float16 per 256 weights.

Minimises the importance-weighted squared error of the weights as decoded:

1.  Every block alone tries a ladder of scales with each magnitude on its own nearest level, which costs little and bounds the error well.
2.  The super-scale d, of some that put the largest scale on or about the highest odd number, is the one whose odd multiples lie nearest to the
    scales of all blocks; every block tries its own odd number, the next best and the third, as
    many as asked, with the nearest vectors of the codebook (`vectors.py`); d becomes the least-squares one for the best.
3.  Codes nearest under the stored scales.
4.  A part of what least squares shrinks is given back to d, codes as they are (`kquants_tiles.growth`).

IQ1's levels -1, 0, 1 lie 1/8 higher or lower by a bit for each block (IQ1_S) or code (IQ1_M); the bit is chosen as in step 1, at every scale
anew.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import F, growth, inverse, round_f16
from fewbit.math.kernels.vectors import load_codes, loose_errors, nearest_vectors


class Layout(NamedTuple):
    """How codes lie in a super-block: vectors per code, bits of an index, sign bits, codes per scale, codes per shift bit, highest scale code."""

    parts: int
    index_bits: int
    sign_bits: int
    per_block: int
    per_shift: int
    top: int


@njit(nogil=True, cache=True, error_model="numpy")
def _loose(target, weight, codebook, layout, scale, loose, variant, block_error):
    """Errors of blocks with every magnitude on its own nearest level, each shift unit taking the better variant."""
    shifts, per_shift, per_block = codebook.shifts, layout.per_shift, layout.per_block
    for v in range(shifts.size):
        for tile in range(2):
            loose_errors(target, weight, tile, scale, codebook.levels, shifts[v], loose, v * 32 + tile * 16)
    block_error[:] = F(0)
    for first in range(0, 32, per_shift):
        least, chosen = F(np.inf), 0
        for v in range(shifts.size):
            total = F(0)
            for code in range(v * 32 + first, v * 32 + first + per_shift):
                total += loose[code]
            if total < least:
                least, chosen = total, v
        for code in range(first, first + per_shift):
            variant[code] = chosen
        block_error[first // per_block] += least


@njit(nogil=True, cache=True, error_model="numpy")
def _start(target, weight, codebook, layout, ladder, scale, loose, variant, block_error, ideal, bend):
    """Step 1: the scale of every block on its own, to `ideal`, and how its error bends with it."""
    blocks, per_block = ideal.size, layout.per_block
    bend[:] = F(0)
    spread, best = np.zeros(blocks, np.float32), np.empty(blocks, np.float32)
    for code in range(32):
        at, block = code // 16 * 128 + code % 16, code // per_block
        for j in range(8):
            x = target[at + j * 16]
            spread[block] = max(spread[block], abs(x))
            bend[block] += weight[at + j * 16] * x * x
    best[:] = F(np.inf)
    ideal[:] = F(0)
    for c in range(ladder.size):
        for code in range(32):
            scale[code] = ladder[c] * spread[code // per_block]
        _loose(target, weight, codebook, layout, scale, loose, variant, block_error)
        for block in range(blocks):
            if block_error[block] < best[block]:
                best[block], ideal[block] = block_error[block], ladder[c] * spread[block]
    for block in range(blocks):
        bend[block] *= inverse(ideal[block] * ideal[block])


@njit(nogil=True, cache=True, error_model="numpy")
def _aligned(ideal, bend, top):
    """The super-scale whose odd multiples are nearest to the scales of all blocks.

    bend: sum h x^2 of a block over its scale squared: a scale that is wrong by a relative r adds about r^2 of the block's energy to its error.
    """
    start, chosen, least = ideal.max() / F(2 * top + 1), F(0), F(np.inf)
    most = F(top)
    for step in range(13):
        d, total = start * (F(0.84) + F(0.04) * F(step)), F(0)
        by = F(0.5) * inverse(d)
        for block in range(ideal.size):
            k = min(max(np.rint(ideal[block] * by - F(0.5)), F(0)), most)
            away = d * (F(2) * k + F(1)) - ideal[block]
            total += bend[block] * away * away
        if total < least:
            least, chosen = total, d
    return round_f16(chosen)


@njit(nogil=True, cache=True, error_model="numpy")
def _evaluate(
    target,
    weight,
    codebook,
    layout,
    d,
    k,
    indexed,
    scale,
    shift,
    forms,
    group,
    loose,
    error,
    index,
    variant,
    block_error,
):
    """Errors of all blocks at scales d (2 k + 1), and with `indexed` which vectors they take."""
    per_block, shifts = layout.per_block, codebook.shifts
    for code in range(32):
        scale[code] = d * F(2 * k[code // per_block] + 1)
    if shifts.size > 1:
        _loose(target, weight, codebook, layout, scale, loose, variant, block_error)
        for code in range(32):
            shift[code] = shifts[variant[code]]
    for tile in range(2):
        nearest_vectors(target, weight, tile, scale, shift, codebook, layout.parts, indexed, forms, group, error, index)
    block_error[:] = F(0)
    for code in range(32):
        block_error[code // per_block] += error[code]


@njit(nogil=True, cache=True, error_model="numpy")
def _agreement(target, weight, codebook, layout, k, index, shift):
    """(sum h x q, sum h q q) of a super-block, q being odd numbers times the vectors chosen: what it stands for at d = 1."""
    table, parts = codebook.table, layout.parts
    width = 8 // parts
    above, below = F(0), F(0)
    for code in range(32):
        at, a, b = code // 16 * 128 + code % 16, F(0), F(0)
        for part in range(parts):
            row = index[code // 16 * 16 * parts + part * 16 + code % 16] * width
            for j in range(width):
                m = table[row + j] + shift[code]
                hm = weight[at] * m
                a += hm * target[at]
                b += hm * m
                at += 16
        odd = F(2 * k[code // layout.per_block] + 1)
        above += odd * a
        below += odd * odd * b
    return above, below


@njit(nogil=True, cache=True, error_model="numpy")
def _grown(target, weight, codebook, layout, k, index, shift, d, share):
    """Step 4: the super-scale with a share of its shrinkage undone."""
    energy = F(0)
    for j in range(target.size):
        energy += weight[j] * target[j] * target[j]
    above, _ = _agreement(target, weight, codebook, layout, k, index, shift)
    return round_f16(d * growth(energy, d * above, share))


@njit(nogil=True, cache=True, error_model="numpy")
def _write(sup, layout, d, k, signs, index, variant, codes, k_out, shift_out, d_out):
    """Codes, scale codes, shift bits and super-scale of one super-block to where they belong."""
    blocks, parts = k.size, layout.parts
    d_out[sup] = d
    for block in range(blocks):
        k_out[sup * blocks + block] = np.uint8(k[block])
    for code in range(32):
        shift_out[(sup * 32 + code) // layout.per_shift] = np.uint8(variant[code])
        word = signs[code]
        for part in range(parts - 1, -1, -1):
            word = word << layout.index_bits | index[code // 16 * 16 * parts + part * 16 + code % 16]
        codes[sup * 32 + code] = np.int32(word)


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def quantize_vectors(x, h, codebook, layout, ladder, trials, refine, unbias, codes, k_out, shift_out, d_out):
    """Quantise super-blocks of 256 weights coded eight at a time.

    Args:
        x: float32 [n * 256]; h: float32 [period], importance repeating along x (period a multiple of 256).
        codebook, layout: the grid; ladder: scales tried, as fractions of a block's largest weight.
        trials: odd numbers that a block tries with real vectors, 1 to 3; refine: whether d is then made the least-squares one.
        unbias: share of the shrinkage that step 4 undoes, 0 to 1.
        codes: out, int32 [n * 32]; k_out: out, uint8 [n * 32 / per_block]; shift_out: out, uint8 [n * 32 / per_shift];
        d_out: out, float32 [n], representable in float16.
    """
    supers, blocks, top, parts = x.size // 256, 32 // layout.per_block, layout.top, layout.parts
    for chunk in prange((supers + 7) // 8):
        target, weight, signs = np.empty(256, np.float32), np.empty(256, np.float32), np.zeros(32, np.int64)
        scale, group = np.empty(32, np.float32), np.empty(32, np.float32)
        error, shift, variant = np.empty(32, np.float32), np.zeros(32, np.float32), np.zeros(32, np.int64)
        loose, index = np.empty(codebook.shifts.size * 32, np.float32), np.zeros(parts * 32, np.int64)
        n = codebook.levels.size
        forms = np.empty((2 * n ** (4 // parts) + 2 * n * n) * 16, np.float32)
        block_error, best, ideal, bend = (
            np.empty(blocks, np.float32),
            np.empty(blocks, np.float32),
            np.empty(blocks, np.float32),
            np.empty(blocks, np.float32),
        )
        centre, side, k, trial = (
            np.zeros(blocks, np.int64),
            np.zeros(blocks, np.int64),
            np.zeros(blocks, np.int64),
            np.zeros(blocks, np.int64),
        )
        for sup in range(chunk * 8, min(supers, chunk * 8 + 8)):
            for tile in range(2):
                load_codes(x, h, sup * 256 + tile * 128, 16, layout.sign_bits, tile, target, weight, signs)
            _start(target, weight, codebook, layout, ladder, scale, loose, variant, block_error, ideal, bend)
            d = _aligned(ideal, bend, top)
            by = inverse(d)
            for block in range(blocks):
                exact = (ideal[block] * by - F(1)) * F(0.5)
                centre[block] = min(max(int(np.rint(exact)), 0), top)
                side[block] = 1 if exact > F(centre[block]) else -1
            best[:] = F(np.inf)
            k[:] = centre
            for step in range(trials if trials > 1 else 0):
                for block in range(blocks):
                    away = side[block] if step == 1 else (-side[block] if step == 2 else 0)
                    trial[block] = min(max(centre[block] + away, 0), top)
                _evaluate(
                    target, weight, codebook, layout, d, trial, False, scale, shift, forms, group, loose, error, index, variant, block_error
                )  # fmt: skip
                for block in range(blocks):
                    if block_error[block] < best[block]:
                        best[block], k[block] = block_error[block], trial[block]
            if refine:
                _evaluate(
                    target, weight, codebook, layout, d, k, True, scale, shift, forms, group, loose, error, index, variant, block_error
                )  # fmt: skip
                above, below = _agreement(target, weight, codebook, layout, k, index, shift)
                d = round_f16(above / below) if above > F(0) and below > F(0) else d
            _evaluate(
                target, weight, codebook, layout, d, k, True, scale, shift, forms, group, loose, error, index, variant, block_error
            )  # fmt: skip
            d = _grown(target, weight, codebook, layout, k, index, shift, d, unbias)
            _write(sup, layout, d, k, signs, index, variant, codes, k_out, shift_out, d_out)
