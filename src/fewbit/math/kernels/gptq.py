"""Error feedback inside one block of columns, a row at a time: the part of the loop that torch cannot fuse.

        columns j of the block ->
    x   . . . . o . . .      x_j is rounded to the level nearest under its group's parameters; the error e_j = w_j - w_hat_j
            |   |   |        is added, times upper[j, k], to every later x_k of the same row
            +---+---+-->

At the first column of a group all candidate parameters are tried: the group is rounded to its end with each, feedback included, and
the one with the least loss is taken. That loss is exactly what the choice costs, because what later columns leave behind does
not depend on it (to first order). The plain torch version of both is `solve.gptq_loop.round_block`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.lanes import WIDTH, higher, load, lower, rint, splat, store, where_greater

LANES = WIDTH  # candidates tried at once; the caller repeats the first to fill up
_FAST = {"contract", "nsz"}  # fused multiply-add; never reassociates


@njit(cache=True)
def _add_scaled(out, row, factor, first, last):
    """out[first:last] += factor * row[first:last], both flat."""
    f = splat(np.float32(factor))
    k = first
    while k + WIDTH <= last:
        store(out, k, load(out, k) + f * load(row, k))
        k += WIDTH
    while k < last:
        out[k] += np.float32(factor) * row[k]
        k += 1


@njit(cache=True, fastmath=_FAST, inline="always")
def _nearest(u: float, uniform: bool, low: float, high: float, edges: np.ndarray) -> float:
    """Index of the nearest level, as a float; for integers the code itself."""
    if uniform:
        return min(max(np.rint(u), low), high)
    first, last = 0, edges.shape[0]
    while first < last:  # first edge that is not below u
        middle = (first + last) >> 1
        if edges[middle] < u:
            first = middle + 1
        else:
            last = middle
    return np.float32(first)


@njit(cache=True, fastmath=_FAST, inline="always")
def _decoded(x, s, z, v, uniform, low, high, levels, edges):
    """(index, value) of the representable number nearest to x under scale s, code shift z and value shift v."""
    u = (x - v) / s + z if s != 0 else z
    index = _nearest(u, uniform, low, high, edges)
    level = index if uniform else levels[int(index)]
    return index, (level - z) * s + v


@njit(cache=True)
def _best_trial(scratch, x, w, upper, weight, j0, j1, scale, zero, shift, uniform, low, high, levels, edges):
    """Which of the candidates loses least when columns j0 ... j1 of one row are rounded with it.

    scale, zero, shift [LANES]: a candidate a lane. scratch [>= (j1 - j0) * LANES]: column by column, the row as each candidate would leave it.
    """
    s, z, v = load(scale, 0), load(zero, 0), load(shift, 0)
    nought = splat(np.float32(0.0))
    per = splat(np.float32(1.0)) / where_greater(s * s, nought, s, splat(np.float32(1.0)))
    per = where_greater(s * s, nought, per, nought)
    bottom, top = splat(np.float32(low)), splat(np.float32(high))
    few = edges.shape[0] <= 16
    level = np.empty(LANES, np.float32)
    total = nought
    for j in range(j0, j1):
        store(scratch, (j - j0) * LANES, splat(x[j]))
    for j in range(j0, j1):
        at = load(scratch, (j - j0) * LANES)
        u = (at - v) * per + z
        if uniform:
            nearest = rint(lower(higher(u, bottom), top))
        elif few:
            nearest = splat(levels[0])
            for k in range(edges.shape[0]):
                nearest = where_greater(u, splat(edges[k]), splat(levels[k + 1]), nearest)
        else:
            store(level, 0, u)
            for c in range(LANES):
                level[c] = levels[int(_nearest(level[c], False, low, high, edges))]
            nearest = load(level, 0)
        value = (nearest - z) * s + v
        miss = at - value
        total = total + splat(weight[j]) * miss * miss
        error = splat(w[j]) - value
        for k in range(j + 1, j1):
            place = (k - j0) * LANES
            store(scratch, place, load(scratch, place) + error * splat(upper[j, k]))
    store(level, 0, total)
    best = 0
    for c in range(1, LANES):
        if level[c] < level[best]:
            best = c
    return best


@njit(cache=True, fastmath=_FAST)
def _round_row(
    w, x, lanes, upper, weight, scale, zero, shift, gid, uniform, low, high, levels, edges, codes, out, choice
):
    """Round one row of a block. x: targets, fed on the way; scale, zero, shift [groups, candidates]; -> loss."""
    cols, candidates = x.shape[0], scale.shape[1]
    loss = 0.0
    c = 0
    for j in range(cols):
        g = gid[j]
        if j == 0 or gid[j - 1] != g:
            c = 0
        if candidates > 1 and (j == 0 or gid[j - 1] != g):
            end = j + 1
            while end < cols and gid[end] == g:
                end += 1
            c = _best_trial(
                lanes, x, w, upper, weight, j, end, scale[g], zero[g], shift[g], uniform, low, high, levels, edges
            )
            choice[g] = c
        index, value = _decoded(x[j], scale[g, c], zero[g, c], shift[g, c], uniform, low, high, levels, edges)
        codes[j] = np.int32(index)
        out[j] = value
        miss = x[j] - value
        loss += weight[j] * miss * miss
        error = w[j] - value
        _add_scaled(x, upper[j], error, j + 1, cols)
    return loss


@njit(cache=True, parallel=True, nogil=True, fastmath=_FAST)
def round_rows(
    w, x, upper, weight, scale, zero, shift, gid, uniform, low, high, levels, edges, codes, out, choice, loss
):
    """All rows of a block, independently.

    Args:
        w, x: float32 [rows, cols], the wanted weights and the same with the feedback of earlier blocks; x is used up.
        upper: float32 [cols, cols], strictly upper; weight: float32 [cols].
        scale, zero, shift: float32 [rows, groups, candidates]; gid: int32 [cols], each group's columns side by side if candidates > 1.
        uniform, low, high, levels, edges: the grid (see `solve.gptq_loop.Rounder`).
        codes: int32 [rows, cols]; out: float32 [rows, cols]; choice: int32 [rows, groups]; loss: float64 [rows]: written.
    """
    for i in prange(x.shape[0]):
        lanes = np.empty(x.shape[1] * LANES, np.float32)
        loss[i] = _round_row(
            w[i],
            x[i],
            lanes,
            upper,
            weight,
            scale[i],
            zero[i],
            shift[i],
            gid,
            uniform,
            low,
            high,
            levels,
            edges,
            codes[i],
            out[i],
            choice[i],
        )


@njit(cache=True, nogil=True, fastmath=_FAST)
def round_tile(
    w,
    x,
    across,
    rows_upper,
    rows_weight,
    upper,
    weight,
    scale,
    zero,
    shift,
    gid,
    uniform,
    low,
    high,
    levels,
    edges,
    codes,
    out,
    choice,
    loss,
):
    """Rows of a tile one after the other, each also taking over what the rows above it left (two-sided feedback).

    Args:
        across: float32 [rows, cols]: feedback of the columns of earlier blocks, as in x; on return, that of this block's columns and
            their own errors too: what later rows take over, times `rows_upper`.
        x: w + `across` + feedback of the rows of earlier tiles.
        rows_upper: float32 [rows, rows], strictly upper; rows_weight: float32 [rows].
        The rest as for `round_rows`.
    """
    rows, cols = x.shape
    lanes = np.empty(cols * LANES, np.float32)
    fed = np.empty(cols, np.float32)
    for i in range(rows):
        for k in range(i):
            f = rows_upper[k, i]
            if f != 0.0:
                _add_scaled(x[i], across[k], f, 0, cols)
        for j in range(cols):
            fed[j] = x[i, j] - across[i, j]
        loss[i] = rows_weight[i] * _round_row(
            w[i],
            x[i],
            lanes,
            upper,
            weight,
            scale[i],
            zero[i],
            shift[i],
            gid,
            uniform,
            low,
            high,
            levels,
            edges,
            codes[i],
            out[i],
            choice[i],
        )
        for j in range(cols):
            across[i, j] = x[i, j] - fed[j] + w[i, j] - out[i, j]
