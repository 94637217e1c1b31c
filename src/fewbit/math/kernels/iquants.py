"""Vector-coded super-blocks (ggml's i-quants): w = sign * magnitude vector * scale, the scale an odd number times a float16 per 256 weights.

Minimises the importance-weighted squared error of the weights as decoded:

1.  Every block alone tries a ladder of scales with each magnitude on its own nearest level, which costs little and bounds the error well.
2.  The super-scale d puts the largest scale on the highest odd number; every block tries the odd numbers around its own, with the
    nearest vectors of the codebook (`vectors.py`); d becomes the least-squares one for these; again, as often as asked.
3.  Codes nearest under the stored scales.

IQ1's levels -1, 0, 1 lie 1/8 higher or lower by a bit for each block (IQ1_S) or code (IQ1_M): two variants of one codebook, of which each
unit takes the better.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import F, round_f16
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
def _gather(error, layout, variants, variant, block_error):
    """Errors of blocks from errors of codes [variants * 32], each shift unit taking its better variant."""
    per_block, per_shift = layout.per_block, layout.per_shift
    block_error[:] = F(0)
    for first in range(0, 32, per_shift):
        least, chosen = F(np.inf), 0
        for v in range(variants):
            total = F(0)
            for code in range(v * 32 + first, v * 32 + first + per_shift):
                total += error[code]
            if total < least:
                least, chosen = total, v
        for code in range(first, first + per_shift):
            variant[code] = chosen
        block_error[first // per_block] += least


@njit(nogil=True, cache=True, error_model="numpy")
def _start(target, weight, codebook, layout, ladder, scale, error, variant, block_error, ideal):
    """Step 1: the scale of every block on its own, to `ideal`."""
    blocks, per_block, variants, levels = ideal.size, layout.per_block, codebook.variants, codebook.levels
    n = levels.size // variants
    spread, best = np.zeros(blocks, np.float32), np.empty(blocks, np.float32)
    for code in range(32):
        at, block = code // 16 * 128 + code % 16, code // per_block
        for j in range(8):
            spread[block] = max(spread[block], abs(target[at + j * 16]))
    best[:] = F(np.inf)
    ideal[:] = F(0)
    for c in range(ladder.size):
        for code in range(32):
            scale[code] = ladder[c] * spread[code // per_block]
        for v in range(variants):
            for tile in range(2):
                loose_errors(target, weight, tile, scale, levels, v * n, n, error, v * 32 + tile * 16)
        _gather(error, layout, variants, variant, block_error)
        for block in range(blocks):
            if block_error[block] < best[block]:
                best[block], ideal[block] = block_error[block], ladder[c] * spread[block]


@njit(nogil=True, cache=True, error_model="numpy")
def _evaluate(
    target, weight, codebook, layout, d, centre, step, indexed, scale, forms, group, error, index, variant, block_error
):
    """Errors of all blocks with scale codes a step from their centres; with `indexed` also which vectors they take."""
    per_block, top = layout.per_block, layout.top
    for code in range(32):
        scale[code] = d * F(2 * min(max(centre[code // per_block] + step, 0), top) + 1)
    for v in range(codebook.variants):
        for tile in range(2):
            nearest_vectors(target, weight, tile, scale, codebook, v, layout.parts, indexed, forms, group, error, index)
    _gather(error, layout, codebook.variants, variant, block_error)


@njit(nogil=True, cache=True, error_model="numpy")
def _super_scale(target, weight, codebook, layout, centre, index, variant, d):
    """The least-squares d for the scale codes and vectors chosen."""
    table, parts = codebook.table, layout.parts
    width = 8 // parts
    entries = table.size // width // codebook.variants
    above, below = F(0), F(0)
    for code in range(32):
        at, a, b = code // 16 * 128 + code % 16, F(0), F(0)
        for part in range(parts):
            entry = index[(variant[code] * 32 + code // 16 * 16) * parts + part * 16 + code % 16]
            row = (variant[code] * entries + entry) * width
            for j in range(width):
                hm = weight[at] * table[row + j]
                a += hm * target[at]
                b += hm * table[row + j]
                at += 16
        odd = F(2 * centre[code // layout.per_block] + 1)
        above += odd * a
        below += odd * odd * b
    return round_f16(above / below) if above > F(0) and below > F(0) else d


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def quantize_vectors(x, h, codebook, layout, ladder, reach, rounds, codes, k_out, shift_out, d_out):
    """Quantise super-blocks of 256 weights coded eight at a time.

    Args:
        x: float32 [n * 256]; h: float32 [period], importance repeating along x (period a multiple of 256).
        codebook, layout: the grid; ladder: scales tried, as fractions of a block's largest weight.
        reach, rounds: how far around a block's odd number to look, and how often.
        codes: out, int32 [n * 32]; k_out: out, uint8 [n * 32 / per_block]; shift_out: out, uint8 [n * 32 / per_shift];
        d_out: out, float32 [n], representable in float16.
    """
    supers, blocks, top, parts = x.size // 256, 32 // layout.per_block, layout.top, layout.parts
    for chunk in prange((supers + 7) // 8):
        target, weight, signs = np.empty(256, np.float32), np.empty(256, np.float32), np.zeros(32, np.int64)
        scale, group = np.empty(32, np.float32), np.empty(32, np.float32)
        error, variant = np.empty(codebook.variants * 32, np.float32), np.zeros(32, np.int64)
        index = np.zeros(codebook.variants * parts * 32, np.int64)
        n = codebook.levels.size // codebook.variants
        forms = np.empty((2 * n ** (4 // parts) + 2 * n * n) * 16, np.float32)
        block_error, best, ideal = (
            np.empty(blocks, np.float32),
            np.empty(blocks, np.float32),
            np.empty(blocks, np.float32),
        )
        centre, k = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
        for sup in range(chunk * 8, min(supers, chunk * 8 + 8)):
            for tile in range(2):
                load_codes(x, h, sup * 256 + tile * 128, 16, layout.sign_bits, tile, target, weight, signs)
            _start(target, weight, codebook, layout, ladder, scale, error, variant, block_error, ideal)
            d = round_f16(ideal.max() / F(2 * top + 1))
            for block in range(blocks):
                code = int(np.rint((ideal[block] / d - F(1)) / F(2))) if d > F(0) else 0
                centre[block] = min(max(code, 0), top)
            for _ in range(rounds):
                best[:] = F(np.inf)
                for step in range(-reach, reach + 1):
                    _evaluate(
                        target,
                        weight,
                        codebook,
                        layout,
                        d,
                        centre,
                        step,
                        False,
                        scale,
                        forms,
                        group,
                        error,
                        index,
                        variant,
                        block_error,
                    )
                    for block in range(blocks):
                        if block_error[block] < best[block]:
                            best[block], k[block] = block_error[block], min(max(centre[block] + step, 0), top)
                centre[:] = k
                _evaluate(
                    target,
                    weight,
                    codebook,
                    layout,
                    d,
                    centre,
                    0,
                    True,
                    scale,
                    forms,
                    group,
                    error,
                    index,
                    variant,
                    block_error,
                )
                d = _super_scale(target, weight, codebook, layout, centre, index, variant, d)
            _evaluate(
                target,
                weight,
                codebook,
                layout,
                d,
                centre,
                0,
                True,
                scale,
                forms,
                group,
                error,
                index,
                variant,
                block_error,
            )
            d_out[sup] = d
            for block in range(blocks):
                k_out[sup * blocks + block] = np.uint8(centre[block])
            for code in range(32):
                v = variant[code]
                shift_out[(sup * 32 + code) // layout.per_shift] = np.uint8(v)
                word = signs[code]
                for part in range(parts - 1, -1, -1):
                    word = word << layout.index_bits | index[(v * 32 + code // 16 * 16) * parts + part * 16 + code % 16]
                codes[sup * 32 + code] = np.int32(word)
