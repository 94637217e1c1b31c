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

All of a super-block is lanes: lane n holds codes 2 n and 2 n + 1, that is, a whole block of 16 weights or half of one of 32. Numbers that belong
to a block stand in all its lanes, so sums over a super-block count blocks of 32 twice, which no quotient notices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.kquants_tiles import F, growth, inverse, inverses, lanes_array, round_f16
from fewbit.math.kernels.lanes import higher, load, lower, neighbour, rint, splat, store, total, where_greater
from fewbit.math.kernels.options import INNER, OUTER
from fewbit.math.kernels.vectors import STRIDE, load_super, loose_errors, nearest_vectors

# rows of the scratch array, one float32 per lane each
_VARIANT, _VECTORS, _IDEAL, _BEND, _K, _BETTER, _KEPT = (16 * row for row in (0, 2, 4, 5, 6, 7, 8))
SCRATCH = 16 * 10


class Layout(NamedTuple):
    """How codes lie in a super-block: vectors per code, bits of an index, sign bits, codes per scale, codes per shift bit, highest scale code."""

    parts: int
    index_bits: int
    sign_bits: int
    per_block: int
    per_shift: int
    top: int


@njit(**INNER, inline="always")
def _blockwise(even, odd, layout):
    """Sums over blocks of numbers of codes 2 n and 2 n + 1, in all lanes of a block."""
    both = even + odd
    return both if layout.per_block == 2 else both + neighbour(both)


@njit(**INNER)
def _loose(target, weight, codebook, layout, scale, s):
    """Errors of blocks with every magnitude on its own nearest level, each shift unit taking the better variant (left in `s`)."""
    levels, shifts = codebook.levels, codebook.shifts
    a = loose_errors(target, weight, 0, scale, levels, shifts[0])
    b = loose_errors(target, weight, 1, scale, levels, shifts[0])
    if shifts.size == 1:
        return _blockwise(a, b, layout)
    c = loose_errors(target, weight, 0, scale, levels, shifts[1])
    d = loose_errors(target, weight, 1, scale, levels, shifts[1])
    zero, one = splat(F(0)), splat(F(1))
    if layout.per_shift == 1:
        store(s, _VARIANT, where_greater(a, c, one, zero))
        store(s, _VARIANT + 16, where_greater(b, d, one, zero))
        return _blockwise(lower(c, a), lower(d, b), layout)
    low, high = _blockwise(a, b, layout), _blockwise(c, d, layout)
    chosen = where_greater(low, high, one, zero)
    store(s, _VARIANT, chosen)
    store(s, _VARIANT + 16, chosen)
    return lower(high, low)


@njit(**INNER)
def _start(target, weight, codebook, layout, ladder, s):
    """Step 1: the scale of every block on its own, and how its error bends with it."""
    zero = splat(F(0))
    spread, bend = zero, zero
    for row in range(0, 256, 16):
        x = load(target, row)
        spread = higher(spread, higher(x, zero - x))
        bend = bend + load(weight, row) * x * x
    if layout.per_block == 4:
        spread, bend = higher(spread, neighbour(spread)), bend + neighbour(bend)
    best, ideal = splat(F(np.inf)), zero
    for c in range(ladder.size):
        scale = splat(ladder[c]) * spread
        error = _loose(target, weight, codebook, layout, scale, s)
        ideal, best = where_greater(best, error, scale, ideal), lower(error, best)
    store(s, _IDEAL, ideal)
    store(s, _BEND, bend * inverses(ideal * ideal))


@njit(**INNER)
def _aligned(s, top):
    """The super-scale whose odd multiples are nearest to the scales of all blocks.

    `_BEND` is sum h x^2 of a block over its scale squared: a scale that is wrong by a relative r adds about r^2 of the block's energy to its error.
    """
    ideal, bend, highest = load(s, _IDEAL), load(s, _BEND), F(0)
    for n in range(16):
        highest = max(highest, s[_IDEAL + n])
    start, chosen, least = highest / F(2 * top + 1), F(0), F(np.inf)
    for step in range(13):
        d = start * (F(0.84) + F(0.04) * F(step))
        away = splat(d) * _odd(_nearest_odd(ideal, d, top)) - ideal
        error = total(bend * away * away)
        if error < least:
            least, chosen = error, d
    return round_f16(chosen)


@njit(**INNER, inline="always")
def _nearest_odd(scale, d, top):
    """k >= 0 of the odd multiple d (2 k + 1) that is nearest to a scale."""
    exact = scale * splat(F(0.5) * inverse(d)) - splat(F(0.5))
    return lower(higher(rint(exact), splat(F(0))), splat(F(top)))


@njit(**INNER, inline="always")
def _odd(k):
    return k + k + splat(F(1))


@njit(**INNER)
def _shifts(codebook, at, s):
    """Shifts of the codes of one tile, by the variants last chosen."""
    low, high = codebook.shifts[0], codebook.shifts[codebook.shifts.size - 1]
    return splat(low) + load(s, at) * splat(high - low)


@njit(**INNER)
def _evaluate(target, weight, codebook, layout, scale, forms, group, index, s):
    """Errors of all blocks at the given scales, which vectors they take, and by which variants (left in `s`)."""
    if codebook.shifts.size > 1:
        _loose(target, weight, codebook, layout, scale, s)
    shifts = _shifts(codebook, _VARIANT, s), _shifts(codebook, _VARIANT + 16, s)
    even, odd = nearest_vectors(target, weight, scale, shifts, codebook, layout.parts, forms, group, index)
    return _blockwise(even, odd, layout)


@njit(**INNER)
def _keep(index, kept, s):
    """Of the lanes that are `_BETTER`, vectors and variants as last evaluated: to `kept` and `_KEPT`."""
    zero, better = splat(F(0)), load(s, _BETTER)
    for row in range(0, 32, 16):
        store(s, _KEPT + row, where_greater(better, zero, load(s, _VARIANT + row), load(s, _KEPT + row)))
    for row in range(0, index.size, 16):
        for n in range(16):
            kept[row + n] = index[row + n] if s[_BETTER + n] > F(0) else kept[row + n]


@njit(**INNER)
def _search(target, weight, codebook, layout, d, trials, forms, group, index, kept, s):
    """Step 2: the k of every block, and its vectors (`kept`) and variants."""
    ideal = load(s, _IDEAL)
    zero, one, top = splat(F(0)), splat(F(1)), splat(F(layout.top))
    centre = _nearest_odd(ideal, d, layout.top)
    exact = (ideal * splat(inverse(d)) - one) * splat(F(0.5))
    side = where_greater(exact, centre, one, zero - one)
    best, k = splat(F(np.inf)), centre
    for step in range(trials):
        away = zero if step == 0 else (side if step == 1 else zero - side)
        trial = lower(higher(centre + away, zero), top)
        error = _evaluate(target, weight, codebook, layout, splat(d) * _odd(trial), forms, group, index, s)
        store(s, _BETTER, where_greater(best, error, one, zero))
        _keep(index, kept, s)
        k, best = where_greater(best, error, trial, k), lower(error, best)
    store(s, _VARIANT, load(s, _KEPT))
    store(s, _VARIANT + 16, load(s, _KEPT + 16))
    return k


@njit(**INNER)
def _agreement(target, weight, codebook, layout, k, index, s):
    """(sum h x q, sum h q q) of a super-block, q being odd numbers times the vectors chosen: what it stands for at d = 1."""
    table, parts = codebook.table, layout.parts
    width = 8 // parts
    above, below, odd = splat(F(0)), splat(F(0)), _odd(k)
    for tile in range(2):
        shift = _shifts(codebook, _VARIANT + tile * 16, s)
        for part in range(parts):
            at = (tile * parts + part) * 16
            for j in range(width):
                row = tile * 128 + (part * width + j) * 16
                for n in range(16):
                    s[_VECTORS + n] = table[index[at + n] * width + j]
                q = (load(s, _VECTORS) + shift) * odd
                hq = load(weight, row) * q
                above, below = above + hq * load(target, row), below + hq * q
    return total(above), total(below)


@njit(**INNER)
def _grown(target, weight, above, d, share):
    """Step 4: the super-scale with a share of its shrinkage undone; above: sum h x q."""
    energy = splat(F(0))
    for row in range(0, 256, 16):
        x = load(target, row)
        energy = energy + load(weight, row) * x * x
    return round_f16(d * growth(total(energy), d * above, share))


@njit(**INNER)
def _write(sup, layout, k, signs, index, codes, k_out, shift_out, s):
    """Codes, scale codes and shift bits of one super-block to where they belong."""
    parts, per_block, per_shift = layout.parts, layout.per_block, layout.per_shift
    store(s, _K, k)
    for block in range(32 // per_block):
        k_out[sup * (32 // per_block) + block] = np.uint8(s[_K + block * per_block // 2])
    for unit in range(32 // per_shift):
        code = unit * per_shift
        shift_out[sup * (32 // per_shift) + unit] = np.uint8(s[_VARIANT + code % 2 * 16 + code // 2])
    for code in range(32):
        word = signs[code]
        for part in range(parts - 1, -1, -1):
            word = word << layout.index_bits | index[(code % 2 * parts + part) * 16 + code // 2]
        codes[sup * 32 + code] = np.int32(word)


@njit(**INNER)
def _solve(target, weight, codebook, layout, ladder, trials, refine, unbias, forms, group, index, kept, s):
    """All four steps for one super-block: (k, d); its vectors in `kept`."""
    _start(target, weight, codebook, layout, ladder, s)
    d = _aligned(s, layout.top)
    k = _search(target, weight, codebook, layout, d, trials, forms, group, index, kept, s)
    above, below = _agreement(target, weight, codebook, layout, k, kept, s)
    if refine and above > F(0) and below > F(0):
        d = round_f16(above / below)
        _evaluate(target, weight, codebook, layout, splat(d) * _odd(k), forms, group, kept, s)
        above, _ = _agreement(target, weight, codebook, layout, k, kept, s)
    return k, _grown(target, weight, above, d, unbias)


@njit(**OUTER, parallel=True)
def quantize_vectors(x, h, codebook, layout, ladder, trials, refine, emphatic, unbias, codes, k_out, shift_out, d_out):
    """Quantise super-blocks of 256 weights coded eight at a time.

    Args:
        x: float32 [n * 256]; h: float32 [period], importance repeating along x (period a multiple of 256).
        codebook, layout: the grid; ladder: scales tried, as fractions of a block's largest weight.
        trials: odd numbers that a block tries with real vectors, 1 to 3; refine: whether d is then made the least-squares one.
        emphatic: whether errors of large weights weigh more (`vectors.load_super`).
        unbias: share of the shrinkage that step 4 undoes; beyond 1 it stretches.
        codes: out, int32 [n * 32]; k_out: out, uint8 [n * 32 / per_block]; shift_out: out, uint8 [n * 32 / per_shift];
        d_out: out, float32 [n], representable in float16.
    """
    supers, n = x.size // 256, codebook.levels.size
    for chunk in prange((supers + 7) // 8):
        target, weight, signs = lanes_array(256), lanes_array(256), np.zeros(32, np.int64)
        forms = lanes_array(2 * n ** (4 // layout.parts) * STRIDE)
        group, index, s = lanes_array(48), np.zeros(layout.parts * 32, np.int64), lanes_array(SCRATCH)
        kept = np.zeros_like(index)
        s[:] = F(0)
        for sup in range(chunk * 8, min(supers, chunk * 8 + 8)):
            load_super(x, h, sup * 256, layout.sign_bits, emphatic, target, weight, signs, group)
            k, d = _solve(
                target, weight, codebook, layout, ladder, trials, refine, unbias, forms, group, index, kept, s
            )  # fmt: skip
            d_out[sup] = d
            _write(sup, layout, k, signs, kept, codes, k_out, shift_out, s)
