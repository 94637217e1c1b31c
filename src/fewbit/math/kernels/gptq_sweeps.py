"""Coordinate descent inside one block of columns: the part of `solve.sweeps` that torch cannot fuse.

Every row keeps half the gradient of the loss at its present values (`slope`). A group's parameters and then each of its codes take their best
place with all else held; what a move does to the slopes of the row is one row of the gram, added.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fewbit.math.kernels.gptq import _FAST, _add_scaled, _decoded


@njit(cache=True, fastmath=_FAST)
def _best_parameters(scratch, slope, level, gram, sums, curvature, j0, j1, scale, zero, shift):
    """Index of the candidate parameters with the least loss for given codes, by the exact quadratic.

    value = level * s + c with c = shift - zero * s, so candidates differ in two numbers; five sums over the group say what each costs.
    The present parameters come first and stay unless another is better by more than rounding. sums: of the group's part of each row of gram.
    """
    ll, lo, oo, pl, po = 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(j0, j1):
        scratch[j] = np.float32(0.0)
    for k in range(j0, j1):
        f = level[k]
        if f != 0:
            _add_scaled(scratch, gram[k], f, j0, j1)
    for j in range(j0, j1):
        ll += level[j] * scratch[j]
        lo += scratch[j]
        oo += sums[j]
        pl += slope[j] * level[j]
        po += slope[j]
    s0 = scale[0]
    c0 = shift[0] - zero[0] * s0
    best, chosen = -1e-6 * abs(curvature * ll * s0 * s0), 0
    for t in range(scale.shape[0]):
        ds = scale[t] - s0
        dc = shift[t] - zero[t] * scale[t] - c0
        change = 2.0 * (ds * pl + dc * po) + curvature * (ds * ds * ll + 2.0 * ds * dc * lo + dc * dc * oo)
        if change < best:
            best, chosen = change, t
    return chosen


@njit(cache=True, fastmath=_FAST)
def _prepared(gram, gid):
    """(sum of each row of gram over the columns of its own group, 1 / diagonal)."""
    cols = gram.shape[0]
    sums, inverse = np.zeros(cols, np.float32), np.empty(cols, np.float32)
    for j in range(cols):
        inverse[j] = np.float32(1.0) / gram[j, j]
        for k in range(cols):
            if gid[k] == gid[j]:
                sums[j] += gram[j, k]
    return sums, inverse


@njit(cache=True, fastmath=_FAST | {"reassoc"})
def _sweep_row(
    scratch,
    sums,
    inverse,
    value,
    slope,
    level,
    index,
    gram,
    curvature,
    scale,
    zero,
    shift,
    gid,
    choice,
    uniform,
    low,
    high,
    levels,
    edges,
):
    """Settle the parameters of every group of one row, then every code, each at its best with all others held; -> codes changed."""
    cols = value.shape[0]
    per = np.float32(1.0) / curvature
    changed = 0
    start = 0
    while start < cols:
        g = gid[start]
        end = start + 1
        while end < cols and gid[end] == g:
            end += 1
        if scale.shape[1] > 1:
            choice[g] = _best_parameters(
                scratch, slope, level, gram, sums, curvature, start, end, scale[g], zero[g], shift[g]
            )
        s, z, v = scale[g, choice[g]], zero[g, choice[g]], shift[g, choice[g]]
        if choice[g] != 0:
            for j in range(start, end):
                new = (level[j] - z) * s + v
                move = (new - value[j]) * curvature
                value[j] = new
                _add_scaled(slope, gram[j], move, 0, cols)
        for j in range(start, end):
            wanted = value[j] - slope[j] * inverse[j] * per
            i, new = _decoded(wanted, s, z, v, uniform, low, high, levels, edges)
            if new != value[j]:
                move = (new - value[j]) * curvature
                changed += index[j] != np.int32(i)  # not where only the last digit of a value is another
                value[j], index[j] = new, np.int32(i)
                level[j] = i if uniform else levels[int(i)]
                _add_scaled(slope, gram[j], move, 0, cols)
        start = end
    return changed


@njit(cache=True, parallel=True, nogil=True, fastmath=_FAST | {"reassoc"})
def sweep_rows(
    value, slope, level, index, gram, scale, zero, shift, gid, choice, uniform, low, high, levels, edges, changed
):
    """Coordinate descent over one block of columns, rows independently.

    Args:
        value, slope, level: float32 [rows, cols]: present values, half the gradient of tr(E H E^T) there, levels of the codes; updated.
        index: int32 [rows, cols] level indices; gram: float32 [cols, cols], its diagonal positive.
        scale, zero, shift: [rows, groups, candidates], the present parameters first; choice: int32 [rows, groups]; changed: int64 [rows].
    """
    sums, inverse = _prepared(gram, gid)
    for i in prange(value.shape[0]):
        scratch = np.empty(value.shape[1], np.float32)
        changed[i] = _sweep_row(
            scratch,
            sums,
            inverse,
            value[i],
            slope[i],
            level[i],
            index[i],
            gram,
            np.float32(1.0),
            scale[i],
            zero[i],
            shift[i],
            gid,
            choice[i],
            uniform,
            low,
            high,
            levels,
            edges,
        )


@njit(cache=True, nogil=True, fastmath=_FAST | {"reassoc"})
def sweep_tile(
    value, slope, level, index, gram, outer, scale, zero, shift, gid, choice, uniform, low, high, levels, edges, changed
):
    """`sweep_rows` for a tile of rows coupled by `outer` float32 [rows, rows]: slope is half the gradient of tr(G E H E^T).

    Of each row it is right when the row's turn comes; it is not kept up afterwards."""
    rows, cols = value.shape
    scratch, own = np.empty(cols, np.float32), np.empty(cols, np.float32)
    sums, inverse = _prepared(gram, gid)
    for i in range(rows):
        for j in range(cols):
            own[j] = slope[i, j]
        changed[i] = _sweep_row(
            scratch,
            sums,
            inverse,
            value[i],
            slope[i],
            level[i],
            index[i],
            gram,
            outer[i, i],
            scale[i],
            zero[i],
            shift[i],
            gid,
            choice[i],
            uniform,
            low,
            high,
            levels,
            edges,
        )
        for j in range(cols):  # what the row's moves did to its own slope, per unit of outer[i, i]
            own[j] = (slope[i, j] - own[j]) / outer[i, i]
        for k in range(i + 1, rows):
            _add_scaled(slope[k], own, outer[k, i], 0, cols)
