"""numba kernels over blocks that lie one after another in memory: extremes, snapping, errors and scale search.

All see x as [blocks, size] of uint16 (bfloat16 bits), int16 (float16 bits) or float32, and one parameter per block. They release
the GIL and work on blocks b0..b1, so that threads can share a tensor.

Speed comes from two layouts. Elementwise work runs along a block. The search holds 16 blocks as lanes, t[k][lane], so that its innermost
loop is a fixed 16 wide and needs no reduction across lanes:

        block 0: x00 x01 x02 ..            t[0] = x00 x10 x20 .. x15,0     one vector register
        block 1: x10 x11 x12 ..     ->     t[1] = x01 x11 x21 .. x15,1
        ..                                 ..

Sums have one fixed order and nothing is contracted into fused multiply-adds, so results are the same on every machine. Only the
extremes may be reordered, which does not change them.

The grid of the codes comes as (low, high, kind, bounds, jumps): integers have kind None and bounds None; floats have
kind = (mantissa bits, code of 1.0 ..., see `float_kind`); tables have their interval ends in `bounds` and the differences of neighbouring levels
in `jumps`. numba compiles one version for each combination and drops the branches of the others.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 16
TILE = 16  # values of k whose levels are held at once: TILE * LANES floats stay in the first-level cache
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |u| < 2^22 to the nearest even integer
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@intrinsic
def widen(typingctx, x):
    """uint16 bfloat16 bits, int16 float16 bits or float32 -> float32."""
    if x not in (types.uint16, types.int16, types.float32):
        return None

    def codegen(context, builder, signature, args):
        (value,) = args
        if signature.args[0] == types.uint16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if signature.args[0] == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return types.float32(x), codegen


@intrinsic
def bits_of(typingctx, x):
    """float32 -> its bits as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx, x):
    """int32 bits -> float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def extremes(x, low, high, b0, b1):
    """Lowest and highest value of each block; returns how many blocks hold NaN or infinity."""
    size = x.shape[1]
    bad = 0
    for b in range(b0, b1):
        least = np.float32(np.inf)
        most = np.float32(-np.inf)
        top = np.int32(0)
        for k in range(size):
            v = widen(x[b, k])
            least = v if v < least else least
            most = v if v > most else most
            magnitude = bits_of(v) & np.int32(0x7FFFFFFF)
            top = magnitude if magnitude > top else top
        low[b] = least
        high[b] = most
        bad += top >= np.int32(0x7F800000)
    return bad


@njit(**_OPTIONS)
def _float_level(u, high, kind):
    """Nearest level of a signed float grid, ties to even. kind = (shift, least normal, magic of the subnormals)."""
    shift, normal, magic = kind
    a = abs(u)
    a = high if a > high else a
    bits = bits_of(a)
    even = (bits >> shift) & np.int32(1)
    rounded = (bits + even + ((np.int32(1) << (shift - np.int32(1))) - np.int32(1))) & ~(
        (np.int32(1) << shift) - np.int32(1)
    )
    level = float_of(rounded) if a >= normal else (a + magic) - magic
    return -level if u < _ZERO else level


@njit(**_OPTIONS)
def _levels(t, at, count, inverse, shift, lev, low, high, kind, bounds, jumps):
    """lev[i, lane] = nearest level of t[at + i, lane] * inverse[lane] + shift[lane], minus the shift."""
    if bounds is not None:
        for i in range(count):
            for n in range(LANES):
                lev[i, n] = low
        for j in range(bounds.shape[0]):
            edge, jump = bounds[j], jumps[j]
            for i in range(count):
                for n in range(LANES):
                    lev[i, n] += jump if t[at + i, n] * inverse[n] > edge else _ZERO
    else:
        for i in range(count):
            for n in range(LANES):
                u = t[at + i, n] * inverse[n] + shift[n]
                if kind is not None:
                    lev[i, n] = _float_level(u, high, kind)
                else:
                    u = low if u < low else u
                    u = high if u > high else u
                    lev[i, n] = ((u + _MAGIC) - _MAGIC) - shift[n]


@njit(**_OPTIONS)
def _sums(t, h, size, inverse, shift, lev, ll, lx, l1, low, high, kind, bounds, jumps):
    """Per lane: ll = sum h q^2, lx = sum h q x, l1 = sum h q, with q the levels that (inverse, shift) give."""
    for n in range(LANES):
        ll[n] = _ZERO
        lx[n] = _ZERO
        l1[n] = _ZERO
    for at in range(0, size, TILE):
        count = min(TILE, size - at)
        _levels(t, at, count, inverse, shift, lev, low, high, kind, bounds, jumps)
        for i in range(count):
            for n in range(LANES):
                q = lev[i, n]
                hq = q if h is None else q * h[at + i, n]
                ll[n] += hq * q
                lx[n] += hq * t[at + i, n]
                l1[n] += hq


@njit(**_OPTIONS)
def _load(x, h, first, b1, t, th, origin):
    """Blocks first..first+15 as lanes, less their origin; lanes beyond b1 repeat the last block."""
    size = x.shape[1]
    for n in range(LANES):
        b = min(first + n, b1 - 1)
        shift = origin[b]
        for k in range(size):
            t[k, n] = widen(x[b, k]) - shift
        if h is not None:
            row = b % h.shape[0]
            for k in range(size):
                th[k, n] = h[row, k]


@njit(**_OPTIONS)
def search_scale(x, h, base, ratios, rounds, out, b0, b1, low, high, kind, bounds, jumps):
    """Least-squares scale without shift: the best of base[i][block] * ratio, each refitted in closed form.

    With the codes q of a candidate the best scale is lx / ll and it explains lx^2 / ll of the sum of squares.
    """
    size = x.shape[1]
    t = np.empty((size, LANES), np.float32)
    th = np.empty((size, LANES), np.float32)
    lev = np.empty((TILE, LANES), np.float32)
    zero = np.zeros(x.shape[0], np.float32)
    none = np.zeros(LANES, np.float32)
    ll, lx, l1, inverse, gain, best = np.zeros((6, LANES), np.float32)
    for first in range(b0, b1, LANES):
        _load(x, h, first, b1, t, th, zero)
        hh = None if h is None else th
        for n in range(LANES):
            gain[n] = np.float32(-1.0)
            best[n] = base[0, min(first + n, b1 - 1)]
        for c in range(base.shape[0] * ratios.shape[0] + rounds):
            for n in range(LANES):
                if c < base.shape[0] * ratios.shape[0]:
                    s = base[c // ratios.shape[0], min(first + n, b1 - 1)] * ratios[c % ratios.shape[0]]
                else:
                    s = best[n]
                inverse[n] = _ONE / s if s != _ZERO else _ZERO
            _sums(t, hh, size, inverse, none, lev, ll, lx, l1, low, high, kind, bounds, jumps)
            for n in range(LANES):
                if ll[n] > _ZERO:
                    fitted = lx[n] / ll[n]
                    if fitted * lx[n] > gain[n]:
                        gain[n] = fitted * lx[n]
                        best[n] = fitted
        for n in range(min(LANES, b1 - first)):
            out[first + n] = best[n]


@njit(**_OPTIONS)
def search_zero(x, h, least, most, ratios, near, rounds, out, out_shift, b0, b1, low, high):
    """Least-squares scale with an integer zero point z in low..high: ratios of the range times `near` neighbours of z."""
    size = x.shape[1]
    t = np.empty((size, LANES), np.float32)
    th = np.empty((size, LANES), np.float32)
    lev = np.empty((TILE, LANES), np.float32)
    zero = np.zeros(x.shape[0], np.float32)
    ll, lx, l1, inverse, shift, gain, best, best_shift = np.zeros((8, LANES), np.float32)
    half = np.float32(0.5)
    tries = 2 * near + 1
    wanted = ratios.shape[0] * tries
    for first in range(b0, b1, LANES):
        _load(x, h, first, b1, t, th, zero)
        hh = None if h is None else th
        for n in range(LANES):
            gain[n] = np.float32(-1.0)
        for c in range(wanted + rounds * tries):
            for n in range(LANES):
                b = min(first + n, b1 - 1)
                if c < wanted:
                    span = (most[b] - least[b]) * ratios[c // tries]
                    s = span / (high - low)
                    origin = (most[b] + least[b] - span) * half
                    z = low - origin / s if s != _ZERO else low
                else:
                    s, z = best[n], best_shift[n]
                z = min(max(z, low), high)
                z = ((z + _MAGIC) - _MAGIC) + np.float32(c % tries - near)
                shift[n] = min(max(z, low), high)
                inverse[n] = _ONE / s if s != _ZERO else _ZERO
            _sums(t, hh, size, inverse, shift, lev, ll, lx, l1, low, high, None, None, None)
            for n in range(LANES):
                if ll[n] > _ZERO:
                    fitted = lx[n] / ll[n]
                    if fitted > _ZERO and fitted * lx[n] > gain[n]:
                        gain[n] = fitted * lx[n]
                        best[n] = fitted
                        best_shift[n] = shift[n]
        for n in range(min(LANES, b1 - first)):
            out[first + n] = best[n]
            out_shift[first + n] = best_shift[n]


@njit(**_OPTIONS)
def search_shift(x, h, least, most, ratios, rounds, down, out, out_shift, b0, b1, low, high):
    """Least-squares scale and float shift v (x ~ q s + v): ratios of the range, each refitted in closed form.

    Sums are taken about the lowest value of each block, so that a large common offset costs no precision. `down` keeps v <= 0.
    """
    size = x.shape[1]
    t = np.empty((size, LANES), np.float32)
    th = np.empty((size, LANES), np.float32)
    lev = np.empty((TILE, LANES), np.float32)
    ll, lx, l1, inverse, shift, gain, best, best_shift, h1, x1 = np.zeros((10, LANES), np.float32)
    half = np.float32(0.5)
    for first in range(b0, b1, LANES):
        _load(x, h, first, b1, t, th, least)
        hh = None if h is None else th
        for n in range(LANES):
            gain[n] = np.float32(-1.0)
            h1[n] = _ZERO
            x1[n] = _ZERO
        for k in range(size):
            for n in range(LANES):
                weight = _ONE if h is None else th[k, n]
                h1[n] += weight
                x1[n] += weight * t[k, n]
        for c in range(ratios.shape[0] + rounds):
            for n in range(LANES):
                b = min(first + n, b1 - 1)
                if c < ratios.shape[0]:
                    whole = most[b] - least[b]
                    s = whole * ratios[c] / (high - low)
                    v = (whole - whole * ratios[c]) * half - low * s
                else:
                    s, v = best[n], best_shift[n]
                inverse[n] = _ONE / s if s > _ZERO else _ZERO
                shift[n] = -v * inverse[n]
            _sums_plain(t, hh, size, inverse, shift, lev, ll, lx, l1, low, high)
            for n in range(LANES):
                origin = least[min(first + n, b1 - 1)]
                det = h1[n] * ll[n] - l1[n] * l1[n]
                if det > np.float32(1e-6) * h1[n] * ll[n]:
                    s = (h1[n] * lx[n] - l1[n] * x1[n]) / det
                    v = (x1[n] - s * l1[n]) / h1[n]
                    if down and v + origin > _ZERO:
                        v = -origin
                        s = (lx[n] - v * l1[n]) / ll[n]
                    # what (s, v) explains of the sum of squares about the origin
                    found = (
                        s * (lx[n] + lx[n] - s * ll[n])
                        + v * (x1[n] + x1[n] - v * h1[n])
                        - np.float32(2.0) * s * v * l1[n]
                    )
                    if s > _ZERO and found > gain[n]:
                        gain[n] = found
                        best[n] = s
                        best_shift[n] = v
        for n in range(min(LANES, b1 - first)):
            out[first + n] = best[n] if gain[n] >= _ZERO else _ZERO
            out_shift[first + n] = best_shift[n] + least[first + n]


@njit(**_OPTIONS)
def _sums_plain(t, h, size, inverse, shift, lev, ll, lx, l1, low, high):
    """As `_sums` for integers, but q keeps the shift: q = round(t * inverse + shift)."""
    for n in range(LANES):
        ll[n] = _ZERO
        lx[n] = _ZERO
        l1[n] = _ZERO
    for k in range(size):
        for n in range(LANES):
            u = t[k, n] * inverse[n] + shift[n]
            u = low if u < low else u
            u = high if u > high else u
            q = (u + _MAGIC) - _MAGIC
            hq = q if h is None else q * h[k, n]
            ll[n] += hq * q
            lx[n] += hq * t[k, n]
            l1[n] += hq


@njit(**_OPTIONS)
def errors(x, h, scale, zero, shift, out, b0, b1, low, high, kind, bounds, jumps):
    """Weighted squared error of each block under stored parameters, exactly as `snap` and `dequantize` round."""
    size = x.shape[1]
    lev = np.empty(size, np.float32)
    part = np.empty(LANES, np.float32)
    for b in range(b0, b1):
        s, z, v = scale[b], zero[b], shift[b]
        _round_block(x, b, s, z, v, lev, low, high, kind, bounds, jumps)
        for n in range(LANES):
            part[n] = _ZERO
        row = 0 if h is None else b % h.shape[0]
        whole = size - size % LANES
        for k in range(0, whole, LANES):
            for n in range(LANES):
                miss = ((lev[k + n] - z) * s + v) - widen(x[b, k + n])
                part[n] += miss * miss if h is None else miss * miss * h[row, k + n]
        for k in range(whole, size):
            miss = ((lev[k] - z) * s + v) - widen(x[b, k])
            part[k - whole] += miss * miss if h is None else miss * miss * h[row, k]
        total = _ZERO
        for n in range(LANES):
            total += part[n]
        out[b] = total


@njit(**_OPTIONS)
def _round_block(x, b, s, z, v, lev, low, high, kind, bounds, jumps):
    """lev[k] = nearest level of (x[b, k] - v) / s + z, or of z where s is 0."""
    size = x.shape[1]
    safe = s if s != _ZERO else np.float32(np.inf)
    if bounds is not None:
        for k in range(size):
            lev[k] = low
        for j in range(bounds.shape[0]):
            edge, jump = bounds[j], jumps[j]
            for k in range(size):
                lev[k] += jump if (widen(x[b, k]) - v) / safe + z > edge else _ZERO
    else:
        for k in range(size):
            u = (widen(x[b, k]) - v) / safe + z
            if kind is not None:
                lev[k] = _float_level(u, high, kind)
            else:
                u = low if u < low else u
                u = high if u > high else u
                lev[k] = (u + _MAGIC) - _MAGIC


@njit(**_OPTIONS)
def snap_integer(x, scale, zero, shift, out, b0, b1, low, high):
    """Integer codes: round((x - v) / s + z) to the nearest even, within low..high."""
    size = x.shape[1]
    for b in range(b0, b1):
        z, v = zero[b], shift[b]
        s = scale[b] if scale[b] != _ZERO else np.float32(np.inf)
        for k in range(size):
            u = (widen(x[b, k]) - v) / s + z
            u = low if u < low else u
            u = high if u > high else u
            out[b, k] = np.int32((u + _MAGIC) - _MAGIC)


@njit(**_OPTIONS)
def snap_float(x, scale, zero, shift, out, b0, b1, high, kind, lowest, sign):
    """Bit patterns of a signed float grid; lowest = exponent bits to take off, sign = the sign bit."""
    size = x.shape[1]
    bits_shift, normal, magic = kind
    half = (np.int32(1) << (bits_shift - np.int32(1))) - np.int32(1)
    for b in range(b0, b1):
        z, v = zero[b], shift[b]
        s = scale[b] if scale[b] != _ZERO else np.float32(np.inf)
        for k in range(size):
            u = (widen(x[b, k]) - v) / s + z
            a = abs(u)
            a = high if a > high else a
            bits = bits_of(a)
            code = ((bits + half + ((bits >> bits_shift) & np.int32(1))) >> bits_shift) - lowest
            code = code if a >= normal else bits_of(a + magic) - bits_of(magic)
            out[b, k] = code | (sign if bits_of(u) < np.int32(0) else np.int32(0))


@njit(**_OPTIONS)
def snap_table(x, scale, zero, shift, out, b0, b1, bounds, order):
    """Codes of a table of at most 16 levels: how many interval ends lie below, then that level's code."""
    size = x.shape[1]
    count = np.empty(size, np.uint8)
    u = np.empty(size, np.float32)
    for b in range(b0, b1):
        z, v = zero[b], shift[b]
        s = scale[b] if scale[b] != _ZERO else np.float32(np.inf)
        for k in range(size):
            u[k] = (widen(x[b, k]) - v) / s + z
            count[k] = np.uint8(0)
        for j in range(bounds.shape[0]):
            edge = bounds[j]
            for k in range(size):
                count[k] += np.uint8(1) if u[k] > edge else np.uint8(0)
        for k in range(size):
            out[b, k] = order[count[k]]
