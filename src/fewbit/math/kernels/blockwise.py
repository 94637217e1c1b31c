"""numba kernels over blocks that lie one after another in memory: extremes, snapping, errors and scale search.

All see x as a flat array of blocks of `size` >= 16 numbers and one parameter per block. `extremes`, `errors` and `snap` also take uint16 (bfloat16
bits) and int16 (float16 bits), the rest float32. They release the GIL and work on blocks b0..b1, so that threads can share a tensor. Weights of
errors, h, are a flat float32 array of whole blocks that repeats over the blocks of x.

Elementwise work takes sixteen numbers along a block at a time. The search holds sixteen blocks side by side instead, so that every sum has
a lane of its own and needs no reduction:

        block 0: x00 x01 x02 ..            t[0] = x00 x10 x20 .. x15,0     one `Lanes`
        block 1: x10 x11 x12 ..     ->     t[1] = x01 x11 x21 .. x15,1
        ..                                 ..

The grid of the codes comes as (low, high, kind, ends, levels): integers have None for the last three; floats have kind = (shift, least
normal, magic), see `lanes.float_level`; tables have the ends of their intervals and their levels in order. numba compiles one version for each
of the three and drops the branches of the others.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fewbit.math.kernels.lanes import (
    WIDTH,
    float_code,
    float_level,
    higher,
    lane,
    load,
    lower,
    not_finite,
    rint,
    splat,
    store,
    where_greater,
)
from fewbit.math.kernels.options import OUTER

_ZERO, _ONE, _TWO, _HALF = np.float32(0.0), np.float32(1.0), np.float32(2.0), np.float32(0.5)
_INFINITE = np.float32(np.inf)


@njit(**OUTER)
def _level(u, low, high, kind, ends, levels):
    """The nearest level of each lane."""
    if kind is not None:
        return float_level(u, high, kind[0], kind[1], kind[2])
    if ends is not None:
        out = splat(low)
        for j in range(ends.shape[0]):
            out = where_greater(u, splat(ends[j]), splat(levels[j + 1]), out)
        return out
    return rint(lower(higher(u, splat(low)), splat(high)))


@njit(**OUTER)
def _at(k, size):
    """Where to read the lanes that start at k: the last ones overlap those before."""
    return min(k, size - WIDTH)


@njit(**OUTER)
def extremes(x, size, low, high, b0, b1):
    """Lowest and highest value of each block; returns whether any is NaN or infinite."""
    bad = splat(_ZERO)
    for b in range(b0, b1):
        least = load(x, b * size)
        most = least
        for k in range(0, size, WIDTH):
            v = load(x, b * size + _at(k, size))
            least = lower(v, least)
            most = higher(v, most)
            bad = higher(not_finite(v), bad)
        for n in range(WIDTH):
            low[b] = lane(least, n) if n == 0 else min(low[b], lane(least, n))
            high[b] = lane(most, n) if n == 0 else max(high[b], lane(most, n))
    found = _ZERO
    for n in range(WIDTH):
        found += lane(bad, n)
    return found != _ZERO


@njit(**OUTER)
def errors(x, size, h, scale, zero, shift, codes, out, b0, b1, low, high, kind, ends, levels):
    """Weighted squared error of each block under stored parameters, with the arithmetic of `snap` and `dequantize`.

    codes: where the codes go on the way, for integers (what `snap` gives); None where they are not wanted.
    """
    ramp = np.empty(WIDTH, np.float32)
    for n in range(WIDTH):
        ramp[n] = n
    places = load(ramp, 0)
    for b in range(b0, b1):
        s, z, v = splat(scale[b]), splat(zero[b]), splat(shift[b])
        safe = splat(scale[b] if scale[b] != _ZERO else _INFINITE)
        row = b * size % h.shape[0]
        total = splat(_ZERO)
        for k in range(0, size, WIDTH):
            at = _at(k, size)
            y = load(x, b * size + at)
            level = _level((y - v) / safe + z, low, high, kind, ends, levels)
            if codes is not None:
                store(codes, b * size + at, level)
            miss = ((level - z) * s + v) - y
            miss = miss * miss * load(h, row + at)
            if at < k:  # lanes that were counted before
                miss = where_greater(splat(np.float32(k - at)), places, splat(_ZERO), miss)
            total = total + miss
        whole = _ZERO
        for n in range(WIDTH):
            whole += lane(total, n)
        out[b] = whole


@njit(**OUTER)
def curvatures(x, size, h, scale, zero, shift, out, out_weight, b0, b1, low, high, kind, ends, levels):
    """Sum h (level - z)^2 and sum h of each block: how its error bends with its scale and with its shift."""
    ramp = np.empty(WIDTH, np.float32)
    for n in range(WIDTH):
        ramp[n] = n
    places, nothing = load(ramp, 0), splat(_ZERO)
    for b in range(b0, b1):
        z, v = splat(zero[b]), splat(shift[b])
        safe = splat(scale[b] if scale[b] != _ZERO else _INFINITE)
        row = b * size % h.shape[0]
        total, weights = nothing, nothing
        for k in range(0, size, WIDTH):
            at = _at(k, size)
            weight = load(h, row + at)
            if at < k:  # lanes that were counted before
                weight = where_greater(splat(np.float32(k - at)), places, nothing, weight)
            q = _level((load(x, b * size + at) - v) / safe + z, low, high, kind, ends, levels) - z
            total = total + weight * q * q
            weights = weights + weight
        ll, hh = _ZERO, _ZERO
        for n in range(WIDTH):
            ll += lane(total, n)
            hh += lane(weights, n)
        out[b] = ll
        out_weight[b] = hh


@njit(**OUTER)
def snap(x, size, scale, zero, shift, out, b0, b1, low, high, kind, ends, marks):
    """Codes of the levels nearest to (x - v) / s + z, or to z where s is 0.

    marks: (what to take off shifted bits, value of the sign bit) for floats; numbers 0, 1, 2 … for tables (their place in order).
    """
    for b in range(b0, b1):
        z, v = splat(zero[b]), splat(shift[b])
        s = splat(scale[b] if scale[b] != _ZERO else _INFINITE)
        for k in range(0, size, WIDTH):
            at = b * size + _at(k, size)
            u = (load(x, at) - v) / s + z
            if kind is not None:
                store(out, at, float_code(u, high, kind[0], kind[1], kind[2], marks[0], marks[1]))
            elif ends is not None:
                store(out, at, _level(u, _ZERO, high, None, ends, marks))
            else:
                store(out, at, _level(u, low, high, None, None, None))


@njit(**OUTER)
def relabel(codes, order, a, b):
    """codes[i] = order[codes[i]] in place."""
    for i in range(a, b):
        codes[i] = order[codes[i]]


@njit(**OUTER)
def _side_by_side(x, size, h, first, end, t, th, origin):
    """Blocks first..first+15, less their origin, as lanes of t; lanes beyond the end repeat the last block."""
    for n in range(WIDTH):
        b = min(first + n, end - 1)
        for k0 in range(0, size, WIDTH):
            at = _at(k0, size)
            v = load(x, b * size + at)
            if origin is not None:
                v = v - splat(origin[b])
            for i in range(WIDTH):
                t[(at + i) * WIDTH + n] = lane(v, i)
        row = b * size % h.shape[0]
        for k in range(size):
            th[k * WIDTH + n] = h[row + k]


@njit(**OUTER)
def _sums(t, th, size, inverse, shift, off, low, high, kind, ends, levels):
    """(sum h q q, sum h q x, sum h q) with q = level(x * inverse + shift) - off, lane by lane."""
    ll, lx, l1 = splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for k in range(size):
        x = load(t, k * WIDTH)
        q = _level(x * inverse + shift, low, high, kind, ends, levels) - off
        hq = q * load(th, k * WIDTH)
        ll = ll + hq * q
        lx = lx + hq * x
        l1 = l1 + hq
    return ll, lx, l1


@njit(**OUTER)
def _inverse(s):
    """1 / s, and 0 where s is 0."""
    zero, turned = splat(_ZERO), splat(_ONE) / s
    return where_greater(s, zero, turned, where_greater(zero, s, turned, zero))


@njit(**OUTER)
def search_scale(x, size, h, base, ratios, rounds, out, b0, b1, low, high, kind, ends, levels):
    """Least-squares scale without shift: the best of base[i, block] * ratio, each refitted in closed form.

    With the codes q of a candidate the best scale is lx / ll, and it explains lx^2 / ll of the sum of squares.
    base: float32 [count, blocks rounded up to lanes]; out: float32 [the same].
    """
    t = np.empty(size * WIDTH, np.float32)
    th = np.empty(size * WIDTH, np.float32)
    none = splat(_ZERO)
    for first in range(b0, b1, WIDTH):
        _side_by_side(x, size, h, first, b1, t, th, None)
        gain, best = splat(-_ONE), load(base[0], first)
        for i in range(base.shape[0]):
            start = load(base[i], first)
            for c in range(ratios.shape[0]):
                inverse = _inverse(start * splat(ratios[c]))
                ll, lx, _ = _sums(t, th, size, inverse, none, none, low, high, kind, ends, levels)
                fitted = lx / ll
                best = where_greater(fitted * lx, gain, fitted, best)
                gain = where_greater(fitted * lx, gain, fitted * lx, gain)
        for _ in range(rounds):
            ll, lx, _ = _sums(t, th, size, _inverse(best), none, none, low, high, kind, ends, levels)
            fitted = lx / ll
            best = where_greater(fitted * lx, gain, fitted, best)
            gain = where_greater(fitted * lx, gain, fitted * lx, gain)
        store(out, first, best)


@njit(**OUTER)
def search_zero(x, size, h, least, most, ratios, near, rounds, out, out_zero, b0, b1, low, high):
    """Least-squares scale with an integer zero point in low..high: ratios of the range times the neighbours of its zero point."""
    t = np.empty(size * WIDTH, np.float32)
    th = np.empty(size * WIDTH, np.float32)
    nothing, bottom, top = splat(_ZERO), splat(low), splat(high)
    for first in range(b0, b1, WIDTH):
        _side_by_side(x, size, h, first, b1, t, th, None)
        lo, hi = load(least, first), load(most, first)
        gain, best, best_z = splat(-_ONE), (hi - lo) / splat(high - low), bottom
        for c in range(ratios.shape[0] + rounds):
            s, centre = best, best_z
            if c < ratios.shape[0]:
                span = (hi - lo) * splat(ratios[c])
                s = span / splat(high - low)
                centre = bottom - (hi + lo - span) * splat(_HALF) * _inverse(s)
                centre = rint(lower(higher(centre, bottom), top))
            inverse = _inverse(s)
            for step in range(-near, near + 1):
                z = lower(higher(centre + splat(np.float32(step)), bottom), top)
                ll, lx, _ = _sums(t, th, size, inverse, z, z, low, high, None, None, None)
                fitted = lx / ll
                found = where_greater(fitted, nothing, fitted * lx, splat(-_ONE))
                best = where_greater(found, gain, fitted, best)
                best_z = where_greater(found, gain, z, best_z)
                gain = where_greater(found, gain, found, gain)
        store(out, first, best)
        store(out_zero, first, best_z)


@njit(**OUTER)
def search_shift(x, size, h, least, most, ratios, rounds, down, out, out_shift, b0, b1, low, high):
    """Least-squares scale and float shift v (x ~ q s + v): ratios of the range, each refitted in closed form.

    Sums are taken about the lowest value of each block, so that a large common offset costs no precision. `down` keeps v <= 0.
    """
    t = np.empty(size * WIDTH, np.float32)
    th = np.empty(size * WIDTH, np.float32)
    nothing, none = splat(_ZERO), splat(-_ONE)
    for first in range(b0, b1, WIDTH):
        _side_by_side(x, size, h, first, b1, t, th, least)
        origin, whole = load(least, first), load(most, first) - load(least, first)
        h1, x1 = nothing, nothing
        for k in range(size):
            weight = load(th, k * WIDTH)
            h1 = h1 + weight
            x1 = x1 + weight * load(t, k * WIDTH)
        gain, best, best_v = none, whole / splat(high - low), nothing
        for c in range(ratios.shape[0] + rounds):
            s, v = best, best_v
            if c < ratios.shape[0]:
                s = whole * splat(ratios[c] / (high - low))
                v = whole * splat((_ONE - ratios[c]) * _HALF) - splat(low) * s
            inverse = _inverse(s)
            ll, lx, l1 = _sums(t, th, size, inverse, nothing - v * inverse, nothing, low, high, None, None, None)
            det = h1 * ll - l1 * l1
            s = (h1 * lx - l1 * x1) / det
            v = (x1 - s * l1) / h1
            if down:
                held = nothing - origin
                s = where_greater(v, held, (lx - held * l1) / ll, s)
                v = where_greater(v, held, held, v)
            # what (s, v) explains of the sum of squares about the origin
            found = s * (lx + lx - s * ll) + v * (x1 + x1 - v * h1) - splat(_TWO) * s * v * l1
            found = where_greater(det, splat(np.float32(1e-6)) * h1 * ll, where_greater(s, nothing, found, none), none)
            best = where_greater(found, gain, s, best)
            best_v = where_greater(found, gain, v, best_v)
            gain = where_greater(found, gain, found, gain)
        store(out, first, best)
        store(out_shift, first, best_v + origin)
