"""The nearest vector of a codebook for sixteen codes at once, exactly, by adding up.

A code stands for 8 weights: `parts` vectors of 8 / parts magnitudes. Each vector is cut in two halves that can take only so many forms (81
for four magnitudes of three levels, 64 for two of eight). For each half the weighted error of every form is tabled; a vector's error is
one sum of two entries. Vectors are sorted by their first half and taken in fours with the same one (filled up by repetition), so that the
least of four is their first half plus the least of four tails:

        x of 16 codes         81 forms of the       81 forms of the           fours
        [8, 16 lanes]   ->    first four levels  +  last four levels    ->    error[first] + min(error[last] of the four)

Loops of fixed length matter more than the repetitions: groups of all lengths would cost a mispredicted branch each. Which vector it was is looked up afterwards, and only where it is needed. Signs are folded into x beforehand. Where they must be even in number
and are odd, the weight that costs least gets the wrong sign, i.e. a negative target among magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from fewbit.math.kernels.kquants_tiles import F
from fewbit.math.kernels.lanes import load, lower, splat, store, where_greater


class Book(NamedTuple):
    """A codebook as the search wants it; forms are multiplied by 16, the stride of their tables.

    Attributes:
        levels: float32 [n], the values that a magnitude can take; shifts: float32 [variants], what a bit may add to them all ([0] without one).
        table: float32 [entries * 8 / parts].
        heads: int64 [fours], forms of the first halves; tails: int64 [fours * 4], forms of the last halves.
        entries: int64 [fours * 4], numbers of the vectors.
    """

    levels: np.ndarray
    shifts: np.ndarray
    table: np.ndarray
    heads: np.ndarray
    tails: np.ndarray
    entries: np.ndarray


def book(table: np.ndarray, shifts: tuple[float, ...] = (0.0,)) -> Book:
    """The search's view of a codebook of magnitude vectors, [entries, width]."""
    levels, codes = np.unique(table, return_inverse=True)
    codes, width = codes.reshape(table.shape), table.shape[1] // 2
    places = len(levels) ** np.arange(width - 1, -1, -1)
    first, last = codes[:, :width] @ places, codes[:, width:] @ places
    order = np.lexsort((last, first))
    entries = []
    for head in np.unique(first):
        group = order[first[order] == head]
        entries += [*group, *[group[-1]] * (-len(group) % 4)]
    entries = np.array(entries, np.int64)
    return Book(
        levels.astype(np.float32),
        np.array(shifts, np.float32),
        np.ascontiguousarray(table, np.float32).reshape(-1),
        (first[entries[::4]] * 16).astype(np.int64),
        (last[entries] * 16).astype(np.int64),
        entries,
    )


@njit(nogil=True, cache=True, error_model="numpy")
def _form_errors(target, weight, first, count, scale, shift, lane, levels, pairs, out, at):
    """Errors of all forms of `count` (2 or 4) magnitudes, whose targets and weights start at `first`: to out[at:], [n ** count, 16].

    scale[lane:] and shift[lane:] belong to the lanes; the constant h x^2 is left out: h s^2 m^2 - 2 h x s m.
    """
    n, s, delta = levels.size, load(scale, lane), load(shift, lane)
    for pair in range(count // 2):
        row = first + pair * 32
        h0, h1 = load(weight, row), load(weight, row + 16)
        a0, a1 = h0 * s * s, h1 * s * s
        b0 = (h0 + h0) * load(target, row) * s
        b1 = (h1 + h1) * load(target, row + 16) * s
        for i in range(n):
            m = splat(levels[i]) + delta
            left = (a0 * m - b0) * m
            for j in range(n):
                k = splat(levels[j]) + delta
                value = left + (a1 * k - b1) * k
                if count == 2:
                    store(out, at + (i * n + j) * 16, value)
                else:
                    store(pairs, ((pair * n + i) * n + j) * 16, value)
    if count == 4:
        for i in range(n * n):
            left = load(pairs, i * 16)
            for j in range(n * n):
                store(out, at + (i * n * n + j) * 16, left + load(pairs, (n * n + j) * 16))


@njit(nogil=True, cache=True, error_model="numpy")
def _least(heads, tails, forms, half, error, at, group):
    """Adds the least error of each lane to error[at:] and leaves the four it lies in; heads' table is forms[:half], tails' the rest."""
    best, which = splat(F(1e30)), splat(F(0))
    number, one = splat(F(0)), splat(F(1))
    for g in range(heads.size):
        t = 4 * g
        left = lower(load(forms, half + tails[t]), load(forms, half + tails[t + 1]))
        right = lower(load(forms, half + tails[t + 2]), load(forms, half + tails[t + 3]))
        low = lower(left, right) + load(forms, heads[g])
        which = where_greater(best, low, number, which)
        best = lower(low, best)
        number = number + one
    store(group, 0, which)
    store(group, 16, best)
    store(error, at, load(error, at) + best)


@njit(nogil=True, cache=True, error_model="numpy")
def _which(heads, tails, entries, forms, half, group, index, at):
    """The numbers of the vectors that `_least` found: index[at:], [16]."""
    for lane in range(16):
        g = int(group[lane])
        head, least = forms[heads[g] + lane], group[16 + lane]
        found = 4 * g
        for t in range(4 * g + 1, 4 * g + 4):
            found = t if forms[half + tails[t] + lane] + head == least else found
        index[at + lane] = entries[found]


@njit(nogil=True, cache=True, error_model="numpy")
def nearest_vectors(target, weight, tile, scale, shift, codebook, parts, indexed, forms, group, error, index):
    """Nearest vectors of one tile of sixteen codes at given scales and shifts.

    target, weight: float32 [tiles * 8 * 16]; scale, shift: float32 [tiles * 16]; forms, group: float32 scratch; error: out, float32
    [tiles * 16], without the constant sum h x^2; index: out, int64 [tiles * parts * 16], if `indexed`.
    """
    levels, heads, tails = codebook.levels, codebook.heads, codebook.tails
    width = 8 // parts
    half = levels.size ** (width // 2) * 16
    pairs = forms[2 * half :]
    at = tile * 16
    store(error, at, splat(F(0)))
    for part in range(parts):
        row = tile * 128 + part * width * 16
        _form_errors(target, weight, row, width // 2, scale, shift, at, levels, pairs, forms, 0)
        _form_errors(target, weight, row + width * 8, width // 2, scale, shift, at, levels, pairs, forms, half)
        _least(heads, tails, forms, half, error, at, group)
        if indexed:
            _which(heads, tails, codebook.entries, forms, half, group, index, at * parts + part * 16)


@njit(nogil=True, cache=True, error_model="numpy")
def loose_errors(target, weight, tile, scale, levels, shift, error, at):
    """As `nearest_vectors` with one shift, every magnitude free to take its own nearest level: a cheap lower bound, to error[at:]."""
    s = load(scale, tile * 16)
    total = splat(F(0))
    for j in range(8):
        x = load(target, tile * 128 + j * 16)
        x = x + x
        least = splat(F(1e30))
        for i in range(levels.size):
            m = s * splat(levels[i] + shift)
            least = lower((m - x) * m, least)
        total = total + load(weight, tile * 128 + j * 16) * least
    store(error, at, total)


@njit(nogil=True, cache=True, error_model="numpy")
def load_codes(x, h, start, count, sign_bits, tile, target, weight, signs):
    """Sixteen codes from weight `start` on as the lanes of a tile: targets with signs folded in, importance, sign bits.

    Lanes from `count` on repeat the last code. h repeats along x.
    """
    for lane in range(16):
        at = start + 8 * min(lane, count - 1)
        place = at % h.size
        bits, odd, cheapest, cost = 0, 0, 0, F(np.inf)
        for j in range(8):
            value, w = x[at + j], h[place + j]
            if sign_bits and value < F(0):
                bits |= 1 << j
                odd ^= 1
                value = -value
            if w * value < cost:
                cost, cheapest = w * value, j
            target[tile * 128 + j * 16 + lane] = value
            weight[tile * 128 + j * 16 + lane] = w
        if sign_bits == 7 and odd:
            bits ^= 1 << cheapest
            target[tile * 128 + cheapest * 16 + lane] = -target[tile * 128 + cheapest * 16 + lane]
        signs[tile * 16 + lane] = bits & ((1 << sign_bits) - 1)
