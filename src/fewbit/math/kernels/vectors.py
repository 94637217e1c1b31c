"""The nearest vector of a codebook for sixteen codes at once, exactly, by adding up.

A code stands for 8 weights: `parts` vectors of 8 / parts magnitudes. Each vector is cut in two halves that can take only so many forms (81
for four magnitudes of three levels, 64 for two of eight). For each half the weighted error of every form is tabled; a vector's error is
one sum of two entries. Vectors are sorted by their first half and taken in fours with the same one (filled up by repetition), so that the
least of four is their first half plus the least of four tails:

        x of 16 codes         81 forms of the       81 forms of the           fours
        [8, 16 lanes]   ->    first four levels  +  last four levels    ->    error[first] + min(error[last] of the four)

Loops of fixed length matter more than the repetitions: groups of all lengths would cost a mispredicted branch each. Which vector it was is
looked up afterwards, and only where it is needed.

A super-block of 256 weights is two tiles of sixteen codes: code 2 n + t is lane n of tile t, weight j of it at t * 128 + j * 16 + n, so that
sixteen weights in a row, transposed, are one lane of both tiles. Signs are folded into x beforehand. Where they must be even in number and are
odd, the weight that costs least gets the wrong sign, i.e. a negative target among magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from fewbit.math.kernels.kquants_tiles import F, transpose
from fewbit.math.kernels.lanes import higher, load, lower, root, splat, store, total, where_greater
from fewbit.math.kernels.options import INNER


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


@njit(**INNER, inline="always")
def _level_errors(target, weight, row, s, delta, levels, out, at):
    """Errors of one magnitude at every level, to out[at:], [n, 16]; the constant h x^2 is left out: h s^2 m^2 - 2 h x s m."""
    h = load(weight, row)
    a, b = h * s * s, (h + h) * load(target, row) * s
    for i in range(levels.size):
        m = splat(levels[i]) + delta
        store(out, at + i * 16, (a * m - b) * m)


@njit(**INNER, inline="always")
def _pair_sums(left, right, n, table, out, at):
    """Sums of every entry of one table with every entry of another, [n, 16] at table[left:] and table[right:], to out[at:], [n * n, 16]."""
    for i in range(n):
        first = load(table, left + i * 16)
        for j in range(n):
            store(out, at + (i * n + j) * 16, first + load(table, right + j * 16))


@njit(**INNER)
def _form_errors(target, weight, first, count, s, delta, levels, scratch, out, at):
    """Errors of all forms of `count` (2 or 4) magnitudes, whose targets and weights start at `first`: to out[at:], [n ** count, 16].

    scratch: float32 [(2 n + 2 n^2) * 16].
    """
    n = levels.size
    right, pairs = n * 16, 2 * n * 16
    for pair in range(count // 2):
        row = first + pair * 32
        _level_errors(target, weight, row, s, delta, levels, scratch, 0)
        _level_errors(target, weight, row + 16, s, delta, levels, scratch, right)
        if count == 2:
            _pair_sums(0, right, n, scratch, out, at)
        else:
            _pair_sums(0, right, n, scratch, scratch, pairs + pair * n * n * 16)
    if count == 4:
        _pair_sums(pairs, pairs + n * n * 16, n * n, scratch, out, at)


@njit(**INNER, inline="always")
def _four(heads, tails, forms, half, g):
    """The least error of four vectors; heads' table is forms[:half], tails' the rest."""
    t = 4 * g
    left = lower(load(forms, half + tails[t]), load(forms, half + tails[t + 1]))
    right = lower(load(forms, half + tails[t + 2]), load(forms, half + tails[t + 3]))
    return lower(left, right) + load(forms, heads[g])


@njit(**INNER)
def _least(heads, tails, forms, half):
    """The least error of each lane."""
    best, other = splat(F(1e30)), splat(F(1e30))
    for g in range(0, heads.size - 1, 2):
        best = lower(_four(heads, tails, forms, half, g), best)
        other = lower(_four(heads, tails, forms, half, g + 1), other)
    return lower(lower(_four(heads, tails, forms, half, heads.size - 1), best), other)


@njit(**INNER)
def _least_of(heads, tails, entries, forms, half, group, index, at):
    """The same, and the numbers of the vectors that have it: index[at:], [16]."""
    best, which, number, one = splat(F(1e30)), splat(F(0)), splat(F(0)), splat(F(1))
    for g in range(heads.size):
        low = _four(heads, tails, forms, half, g)
        which = where_greater(best, low, number, which)
        best = lower(low, best)
        number = number + one
    store(group, 0, which)
    store(group, 16, best)
    for lane in range(16):
        g = int(group[lane])
        head, least = forms[heads[g] + lane], group[16 + lane]
        found = 4 * g
        for t in range(4 * g + 1, 4 * g + 4):
            found = t if forms[half + tails[t] + lane] + head == least else found
        index[at + lane] = entries[found]
    return best


@njit(**INNER)
def nearest_vectors(target, weight, tile, scale, shift, codebook, parts, indexed, forms, group, index):
    """Errors of the nearest vectors of one tile of sixteen codes at given scales and shifts, without the constant sum h x^2.

    target, weight: float32 [2 * 8 * 16]; scale, shift: lanes; forms, group: float32 scratch; index: out, int64 [2 * parts * 16], numbers of the
    vectors, if `indexed`.
    """
    levels, heads, tails = codebook.levels, codebook.heads, codebook.tails
    width = 8 // parts
    half = levels.size ** (width // 2) * 16
    scratch = forms[2 * half :]
    error = splat(F(0))
    for part in range(parts):
        row = tile * 128 + part * width * 16
        _form_errors(target, weight, row, width // 2, scale, shift, levels, scratch, forms, 0)
        _form_errors(target, weight, row + width * 8, width // 2, scale, shift, levels, scratch, forms, half)
        if indexed:
            at = (tile * parts + part) * 16
            error = error + _least_of(heads, tails, codebook.entries, forms, half, group, index, at)
        else:
            error = error + _least(heads, tails, forms, half)
    return error


@njit(**INNER)
def loose_errors(target, weight, tile, scale, levels, shift):
    """As `nearest_vectors` with one shift, every magnitude free to take its own nearest level: a cheap lower bound."""
    total = splat(F(0))
    for row in range(tile * 128, tile * 128 + 128, 16):
        x = load(target, row)
        x = x + x
        least = splat(F(1e30))
        for i in range(levels.size):
            m = scale * splat(levels[i] + shift)
            least = lower((m - x) * m, least)
        total = total + load(weight, row) * least
    return total


@njit(**INNER)
def _emphasise(target, weight):
    """Importance times sqrt(2 mean(x^2) + x^2): large weights count for more, as they do in ggml's encoders."""
    energy = splat(F(0))
    for row in range(0, 256, 16):
        value = load(target, row)
        energy = energy + value * value
    level = splat(total(energy) * F(1 / 128))
    for row in range(0, 256, 16):
        value = load(target, row)
        store(weight, row, load(weight, row) * root(level + value * value))


@njit(**INNER)
def load_super(x, h, start, sign_bits, emphatic, target, weight, signs, scratch):
    """The super-block from weight `start` on as two tiles: targets with signs folded in, what errors weigh, sign bits of the codes in order.

    h repeats along x, its period a multiple of 256; emphatic: whether large weights' errors weigh more; signs: out, int64 [32]; scratch: float32 [48].
    """
    transpose(x, start, 16, target, 0)
    transpose(h, start % h.size, 16, weight, 0)
    if emphatic:
        _emphasise(target, weight)
    if sign_bits == 0:
        return
    zero, one = splat(F(0)), splat(F(1))
    for tile in range(2):
        bits, count, cost, cheapest, place = zero, zero, splat(F(np.inf)), zero, zero
        for row in range(tile * 128, tile * 128 + 128, 16):
            value = load(target, row)
            negative = where_greater(zero, value, one, zero)
            value = higher(value, zero - value)
            price = load(weight, row) * value
            bits, count = bits + negative * splat(F(1 << (row // 16 % 8))), count + negative
            cheapest = where_greater(cost, price, place, cheapest)
            cost, place = lower(price, cost), place + one
            store(target, row, value)
        store(scratch, 0, bits)
        store(scratch, 16, count)
        store(scratch, 32, cheapest)
        for lane in range(16):
            word = int(scratch[lane])
            if sign_bits == 7 and int(scratch[16 + lane]) & 1:
                at = tile * 128 + int(scratch[32 + lane]) * 16 + lane
                target[at] = -target[at]
                word ^= 1 << int(scratch[32 + lane])
            signs[2 * lane + tile] = word & ((1 << sign_bits) - 1)
