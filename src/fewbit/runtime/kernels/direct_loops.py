"""Loops of `direct`: rows of a packed weight times activations, codes decoded in registers.

A row's columns go by in runs that share one scale (for groups of 16: two scales per run of 32). One token:

    y[r]  =  Σ_runs  scale * Σ_columns level * x   +   Σ_groups  zero * sum of x over the group

so a scale costs one multiplication per 16 lanes and run, and shifts nothing per weight. Several tokens: a row is decoded once into the first cache,
then multiplied with each. Codes of 4 bits lie two to a byte, so activations and decoded rows hold even columns first, then odd ones.

Scales that are themselves quantised are decoded a row at a time. An `Array` of entries per block is a tuple (plain float32 [n], codes uint8 [n],
table float32 [256], outer float32 [m], per, offset float32 [1]): entry i is plain[i], or table[codes[i]] * outer[i // per] + offset where `plain`
is empty; both empty is no array.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.lanes import load, splat, store
from fewbit.math.kernels.options import OUTER
from fewbit.runtime.kernels.vectors import e4m3, e5m2, fma, halves, indices, look, total, upper, whole

NIBBLES, WHOLE, E4M3, E5M2 = 0, 1, 2, 3  # how codes lie
ROWS = 32  # rows that a thread takes at a time


@njit(**OUTER)
def _fill(out, array, start, n):
    """out float32 [>= n]: entries start .. start + n of an Array."""
    plain, codes, table, outer, per, offset = array
    if plain.size:
        for j in range(n):
            out[j] = plain[start + j]
        return
    block, j, shift = start // per, 0, offset[0]
    left = (block + 1) * per - start
    while j < n:
        factor, stop = outer[block], min(n, j + left)
        for i in range(j, stop):
            out[i] = table[codes[start + i]] * factor + shift
        j, block, left = stop, block + 1, per


@njit(**OUTER)
def _entries(arrays, start, n):
    """(scale, zero) float32 [n] of w = level * scale + zero, entries start .. start + n; zero is empty where it is nothing."""
    scales, code_shift, value_shift = arrays
    has_code, has_value = code_shift[0].size + code_shift[1].size > 0, value_shift[0].size + value_shift[1].size > 0
    scale, zero = np.empty(n, np.float32), np.zeros(n if has_code or has_value else 0, np.float32)
    _fill(scale, scales, start, n)
    if has_value:
        _fill(zero, value_shift, start, n)
    if has_code:
        more = np.empty(n, np.float32)
        _fill(more, code_shift, start, n)
        for j in range(n):
            zero[j] -= more[j] * scale[j]
    return scale, zero


@njit(fastmath={"reassoc", "contract"}, **OUTER)
def _weighted(zero, at, sums):
    """Σ zero[at + g] * sums[g]."""
    found = np.float32(0)
    for g in range(sums.size):
        found += zero[at + g] * sums[g]
    return found


def _for_nibbles(steps):
    """The product of a row of 4-bit codes in runs of `steps` times 32 columns."""

    @njit(**OUTER)
    def dot(codes, at, table, x, cols, scale, first, per, pair):
        levels, half, sums, i = load(table, 0), cols // 2, splat(np.float32(0)), 0
        for group in range(cols // (32 * steps * per)):
            entry = first + group
            factor = halves(scale[entry + group], scale[entry + group + 1]) if pair else splat(scale[entry])
            for _ in range(per):
                even, odd = splat(np.float32(0)), splat(np.float32(0))
                for step in range(steps):
                    index = indices(codes, at + i + 16 * step)
                    even = fma(look(levels, index), load(x, i + 16 * step), even)
                    odd = fma(look(levels, upper(index)), load(x, half + i + 16 * step), odd)
                sums = fma(factor, even + odd, sums)
                i += 16 * steps
        return total(sums)

    return dot


_nibbles_dot_1, _nibbles_dot_2, _nibbles_dot_4 = _for_nibbles(1), _for_nibbles(2), _for_nibbles(4)


@njit(inline="always")
def _spread(values, first, run, per, pair):
    """The entry of a run: `per` runs share one, or a run has two; nothing where there are none."""
    if not values.size:
        return splat(np.float32(0))
    if pair:
        return halves(values[first + 2 * run], values[first + 2 * run + 1])
    return splat(values[first + run // per])


@njit(**OUTER)
def _nibbles_decode(codes, at, table, out, to, cols, size, scale, zero, first, per, pair):
    levels, half = load(table, 0), cols // 2
    for run in range(cols // size):
        factor, shift = _spread(scale, first, run, per, pair), _spread(zero, first, run, per, pair)
        for i in range(run * size // 2, (run + 1) * size // 2, 16):
            index = indices(codes, at + i)
            store(out, to + i, fma(look(levels, index), factor, shift))
            store(out, to + half + i, fma(look(levels, upper(index)), factor, shift))


def _for_bytes(read):
    """The two loops for codes of one byte each, by how 16 of them are read."""

    @njit(**OUTER)
    def dot(codes, at, x, cols, size, scale, first, per):
        sums, i = splat(np.float32(0)), 0
        for group in range(cols // (size * per)):
            factor = splat(scale[first + group])
            for _ in range(per * size // 32):
                one = fma(read(codes, at + i + 16), load(x, i + 16), read(codes, at + i) * load(x, i))
                sums = fma(factor, one, sums)
                i += 32
        return total(sums)

    @njit(**OUTER)
    def decode(codes, at, out, to, cols, size, scale, zero, first, per):
        for run in range(cols // size):
            factor, shift = _spread(scale, first, run, per, False), _spread(zero, first, run, per, False)
            for i in range(run * size, (run + 1) * size, 16):
                store(out, to + i, fma(read(codes, at + i), factor, shift))

    return dot, decode


_whole_dot, _whole_decode = _for_bytes(whole)
_e4m3_dot, _e4m3_decode = _for_bytes(e4m3)
_e5m2_dot, _e5m2_decode = _for_bytes(e5m2)


@njit(**OUTER)
def _dot(kind, codes, at, table, x, cols, size, scale, first, per, pair):
    if kind == WHOLE:
        return _whole_dot(codes, at, x, cols, size, scale, first, per)
    if kind == E4M3:
        return _e4m3_dot(codes, at, x, cols, size, scale, first, per)
    if kind == E5M2:
        return _e5m2_dot(codes, at, x, cols, size, scale, first, per)
    if size == 128:
        return _nibbles_dot_4(codes, at, table, x, cols, scale, first, per, pair)
    if size == 64:
        return _nibbles_dot_2(codes, at, table, x, cols, scale, first, per, pair)
    return _nibbles_dot_1(codes, at, table, x, cols, scale, first, per, pair)


@njit(**OUTER)
def _decode(kind, codes, at, table, out, to, cols, size, scale, zero, first, per, pair):
    if kind == NIBBLES:
        _nibbles_decode(codes, at, table, out, to, cols, size, scale, zero, first, per, pair)
    elif kind == WHOLE:
        _whole_decode(codes, at, out, to, cols, size, scale, zero, first, per)
    elif kind == E4M3:
        _e4m3_decode(codes, at, out, to, cols, size, scale, zero, first, per)
    else:
        _e5m2_decode(codes, at, out, to, cols, size, scale, zero, first, per)


@njit(**OUTER)
def _plain_dot(w, x, at, cols):
    one, two = splat(np.float32(0)), splat(np.float32(0))
    for i in range(0, cols, 32):
        one = fma(load(w, i), load(x, at + i), one)
        two = fma(load(w, i + 16), load(x, at + i + 16), two)
    return total(one + two)


@njit(**OUTER)
def _rows_times(kind, codes, table, arrays, x, sums, form, r0, r1, out):
    """Rows r0 … r1 of the product; see `times`."""
    cols, size, per, pair, groups = form[0], form[1], form[2], form[3] == 1, form[4]
    block_rows, width, tokens = form[5], codes.size // form[6], x.size // form[0]
    top = r0 // block_rows
    scale, zero = _entries(arrays, top * groups, ((r1 - 1) // block_rows - top + 1) * groups)
    row = np.empty(cols if tokens > 1 else 0, np.float32)
    for r in range(r0, r1):
        first = (r // block_rows - top) * groups
        if tokens > 1:
            _decode(kind, codes, r * width, table, row, 0, cols, size, scale, zero, first, per, pair)
            for t in range(tokens):
                out[t, r] = _plain_dot(row, x, t * cols, cols)
        else:
            y = _dot(kind, codes, r * width, table, x, cols, size, scale, first, per, pair)
            out[0, r] = y + _weighted(zero, first, sums) if zero.size else y


@njit(parallel=True, **OUTER)
def times(kind, codes, table, arrays, x, sums, form, out):
    """out float32 [tokens, rows] = x @ w.T.

    Args:
        kind: NIBBLES, WHOLE, E4M3 or E5M2.
        codes: uint8 or int8, flat, rows one after the other.
        table: float32 [16], levels of 4-bit codes.
        arrays: Arrays of scale, code_shift and value_shift.
        x: float32 [tokens * cols], flat; for NIBBLES even columns of each token first.
        sums: float32 [groups], of x over each group; only for one token.
        form: int64 [7], (cols, columns per run, runs per scale, whether a run has two scales, scales per row, rows per scale, rows).
    """
    rows = out.shape[1]
    scale, codes_shift, values = arrays
    s0, s1, s2, s3, s4, s5 = scale  # tuples of arrays do not enter parallel loops whole
    c0, c1, c2, c3, c4, c5 = codes_shift
    v0, v1, v2, v3, v4, v5 = values
    for part in prange((rows + ROWS - 1) // ROWS):
        arrays = ((s0, s1, s2, s3, s4, s5), (c0, c1, c2, c3, c4, c5), (v0, v1, v2, v3, v4, v5))
        _rows_times(kind, codes, table, arrays, x, sums, form, part * ROWS, min(rows, (part + 1) * ROWS), out)


@njit(**OUTER)
def _rows_decoded(kind, codes, table, arrays, form, begin, r0, r1, out):
    cols, size, per, pair, groups = form[0], form[1], form[2], form[3] == 1, form[4]
    block_rows, width = form[5], codes.size // form[6]
    top = r0 // block_rows
    scale, zero = _entries(arrays, top * groups, ((r1 - 1) // block_rows - top + 1) * groups)
    for r in range(r0, r1):
        first = (r // block_rows - top) * groups
        _decode(kind, codes, r * width, table, out, (r - begin) * cols, cols, size, scale, zero, first, per, pair)


@njit(parallel=True, **OUTER)
def decoded(kind, codes, table, arrays, form, first, last, out):
    """out float32 [(last - first) * cols]: rows first … last of the weight, columns in the order that `times` wants x in."""
    scale, codes_shift, values = arrays
    s0, s1, s2, s3, s4, s5 = scale
    c0, c1, c2, c3, c4, c5 = codes_shift
    v0, v1, v2, v3, v4, v5 = values
    for part in prange((last - first + ROWS - 1) // ROWS):
        arrays = ((s0, s1, s2, s3, s4, s5), (c0, c1, c2, c3, c4, c5), (v0, v1, v2, v3, v4, v5))
        r0 = first + part * ROWS
        _rows_decoded(kind, codes, table, arrays, form, first, r0, min(last, r0 + ROWS), out)
