"""The nearest vector of a codebook for sixteen codes at once, exactly, by adding up.

A code stands for 8 weights: `parts` vectors of 8 / parts magnitudes. Each vector is cut in two halves that can take only so many forms (81
for four magnitudes of three levels, 64 for two of eight). For each half the weighted error of every form is tabled; a vector's error is
one sum of two entries. Vectors are sorted by their first half and taken in eights with the same one (filled up by repetition), so that the
least of eight is their first half plus the least of eight tails:

        x of 16 codes         81 forms of the       81 forms of the           eights
        [8, 16 lanes]   ->    first four levels  +  last four levels    ->    error[first] + min(error[last] of the eight)

Loops of fixed length matter more than the repetitions: groups of all lengths would cost a mispredicted branch each. Which vector it was is
looked up afterwards, among the eight alone.

A super-block of 256 weights is two tiles of sixteen codes: code 2 n + t is lane n of tile t, weight j of it at t * 128 + j * 16 + n, so that
sixteen weights in a row, transposed, are one lane of both tiles. Signs are folded into x beforehand. Where they must be even in number and are
odd, the weight that costs least gets the wrong sign, i.e. a negative target among magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fewbit.math.kernels.kquants_tiles import F, transpose
from fewbit.math.kernels.lanes import _VF, Lanes, _spread, higher, load, lower, root, splat, store, total, where_greater
from fewbit.math.kernels.options import INNER

STRIDE = 32  # of a table of forms: sixteen lanes for each of two tiles


class Book(NamedTuple):
    """A codebook as the search wants it; forms are multiplied by the stride of their tables.

    Attributes:
        levels: float32 [n], the values that a magnitude can take; shifts: float32 [variants], what a bit may add to them all ([0] without one).
        table: float32 [entries * 8 / parts].
        heads: int16 [eights], forms of the first halves; tails: int16 [eights * 8], forms of the last halves.
        entries: int64 [eights * 8], numbers of the vectors.
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
    if (len(levels), width) not in ((3, 4), (8, 2)):
        raise ValueError(f"no search over vectors of twice {width} magnitudes of {len(levels)} levels")
    order = np.lexsort((last, first))
    entries = []
    for head in np.unique(first):
        group = order[first[order] == head]
        entries += [*group, *[group[-1]] * (-len(group) % 8)]
    entries = np.array(entries, np.int64)
    return Book(
        levels.astype(np.float32),
        np.array(shifts, np.float32),
        np.ascontiguousarray(table, np.float32).reshape(-1),
        (first[entries[::8]] * STRIDE).astype(np.int16),
        (last[entries] * STRIDE).astype(np.int16),
        entries,
    )


def _former(levels_count: int, count: int):
    """Errors of all forms of `count` magnitudes of so many levels, to sixteen of every 32 numbers of out[at:].

    Targets and weights start at `first`. The error of a magnitude m under scale s is h s^2 m^2 - 2 h x s m, the constant h x^2 left out. The
    numbers are known when this is compiled, so that all sums but the last stay in registers: a loop over levels takes six times as long.
    """

    @intrinsic
    def form_errors(typingctx, target, weight, first, s, delta, levels, out, at):
        def codegen(context, builder, signature, args):
            target, weight, first, s, delta, levels, out, at = args
            arrays = dict(zip((target, weight, levels, out), (signature.args[n] for n in (0, 1, 5, 6)), strict=True))

            def place(array, start, offset):
                data = context.make_array(arrays[array])(context, builder, array).data
                return builder.gep(data, [builder.add(start, ir.Constant(start.type, offset))])

            def lanes(array, offset):
                return builder.load(builder.bitcast(place(array, first, offset), _VF.as_pointer()), align=4)

            zero = ir.Constant(first.type, 0)
            magnitudes = [
                builder.fadd(_spread(builder, builder.load(place(levels, zero, i)), _VF), delta)
                for i in range(levels_count)
            ]
            sums = []
            for n in range(count):
                h, x = lanes(weight, 16 * n), lanes(target, 16 * n)
                a = builder.fmul(builder.fmul(h, s), s)
                b = builder.fmul(builder.fmul(builder.fadd(h, h), x), s)
                sums.append([builder.fmul(builder.fsub(builder.fmul(a, m), b), m) for m in magnitudes])
            while len(sums) > 2:
                sums = [[builder.fadd(p, q) for p in sums[n] for q in sums[n + 1]] for n in range(0, len(sums), 2)]
            for n, error in enumerate(builder.fadd(p, q) for p in sums[0] for q in sums[1]):
                builder.store(error, builder.bitcast(place(out, at, STRIDE * n), _VF.as_pointer()), align=4)
            return context.get_dummy_value()

        index = types.intp
        return types.void(target, weight, index, Lanes, Lanes, levels, out, index), codegen

    return form_errors


_four_of_3, _two_of_8 = _former(3, 4), _former(8, 2)


@njit(**INNER, inline="always")
def _eight(heads, tails, forms, half, g, at):
    """The least errors of eight vectors in the tile whose lanes begin at `at`; heads' table is forms[:half], tails' the rest."""
    t, tail = 8 * g, half + at
    a = lower(load(forms, tail + tails[t]), load(forms, tail + tails[t + 1]))
    b = lower(load(forms, tail + tails[t + 2]), load(forms, tail + tails[t + 3]))
    c = lower(load(forms, tail + tails[t + 4]), load(forms, tail + tails[t + 5]))
    d = lower(load(forms, tail + tails[t + 6]), load(forms, tail + tails[t + 7]))
    return lower(lower(a, b), lower(c, d)) + load(forms, heads[g] + at)


@njit(**INNER)
def _numbers(which, least, tile, heads, tails, entries, forms, half, group, index, at):
    """The numbers of the vectors of one tile that have the least errors, found among eight: index[at:], [16]."""
    store(group, 0, which)
    store(group, 16, least)
    for lane in range(tile * 16, tile * 16 + 16):
        g, n = int(group[lane % 16]), lane % 16
        head, best = forms[heads[g] + lane], group[16 + n]
        found = 8 * g
        for t in range(8 * g + 1, 8 * g + 8):
            found = t if forms[half + tails[t] + lane] + head == best else found
        index[at + n] = entries[found]


@njit(**INNER)
def _least_of(heads, tails, entries, forms, half, group, index, part, parts):
    """The least errors of each lane of both tiles, and the numbers of the vectors that have them: index [2 tiles, parts, 16]."""
    even, odd, number, one = splat(F(1e30)), splat(F(1e30)), splat(F(0)), splat(F(1))
    which_even, which_odd = number, number
    for g in range(heads.size):
        a, b = _eight(heads, tails, forms, half, g, 0), _eight(heads, tails, forms, half, g, 16)
        which_even, which_odd = where_greater(even, a, number, which_even), where_greater(odd, b, number, which_odd)
        even, odd, number = lower(a, even), lower(b, odd), number + one
    _numbers(which_even, even, 0, heads, tails, entries, forms, half, group, index, part * 16)
    _numbers(which_odd, odd, 1, heads, tails, entries, forms, half, group, index, (parts + part) * 16)
    return even, odd


@njit(**INNER)
def nearest_vectors(target, weight, scale, shifts, codebook, parts, forms, group, index):
    """Errors of the nearest vectors of both tiles at given scales, without the constant sum h x^2: (even codes', odd codes').

    target, weight: float32 [2 * 8 * 16]; scale: lanes; shifts: a pair of lanes; forms, group: float32 scratch; index: out, int64
    [2 * parts * 16], numbers of the vectors.
    """
    levels, heads, tails = codebook.levels, codebook.heads, codebook.tails
    width = 8 // parts
    half = levels.size ** (width // 2) * STRIDE
    even, odd = splat(F(0)), splat(F(0))
    for part in range(parts):
        for tile in range(2):
            row, at = tile * 128 + part * width * 16, tile * 16
            shift = shifts[1] if tile else shifts[0]
            if levels.size == 3:
                _four_of_3(target, weight, row, scale, shift, levels, forms, at)
                _four_of_3(target, weight, row + 64, scale, shift, levels, forms, half + at)
            else:
                _two_of_8(target, weight, row, scale, shift, levels, forms, at)
                _two_of_8(target, weight, row + 32, scale, shift, levels, forms, half + at)
        a, b = _least_of(heads, tails, codebook.entries, forms, half, group, index, part, parts)
        even, odd = even + a, odd + b
    return even, odd


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
