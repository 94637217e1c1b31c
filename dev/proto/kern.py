from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange


def inverse_factor(h: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper U with U^T U = (H + damp mean diag)^-1, float32."""
    h = h.double()
    h = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inv = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inv, upper=True).float()


@njit(inline="always")
def _q(w, s, z, top):
    v = np.rint(w / s) + z
    v = min(max(v, 0.0), top)
    return (v - z) * s


@njit(fastmath=True, cache=True)
def _group_loss(buf, wg, u, d, j0, g, s, z, top):
    """Loss of quantising the group's columns in order with feedback inside the group."""
    for j in range(g):
        buf[j] = wg[j]
    loss = np.float32(0.0)
    for j in range(g):
        q = _q(buf[j], s, z, top)
        e = (buf[j] - q) / d[j0 + j]
        loss += e * e
        for k in range(j + 1, g):
            buf[k] -= e * u[j0 + j, j0 + k]
    return loss


@njit(fastmath=True, cache=True)
def _fit(buf, wg, u, d, j0, g, top, ratios, mode):
    """(scale, zero) for a group: mode 0 min-max, 1 weighted-MSE search by 1/d^2, 2 trial loop."""
    lo, hi = np.float32(0.0), np.float32(0.0)
    for j in range(g):
        lo, hi = min(lo, wg[j]), max(hi, wg[j])
    if hi - lo < 1e-12:
        return np.float32(1e-8), np.float32(0.0)
    best, bs, bz = np.float32(np.inf), np.float32(0), np.float32(0)
    for r in range(len(ratios)):
        s = np.float32((hi - lo) * ratios[r] / top)
        zc = np.rint(-lo * ratios[r] / s)
        for dz in range(-1, 2) if mode > 0 else range(0, 1):
            z = np.float32(min(max(zc + dz, 0.0), top))
            if mode == 0:
                return s, z
            if mode == 1:
                loss = np.float32(0.0)
                for j in range(g):
                    e = (wg[j] - _q(wg[j], s, z, top)) / d[j0 + j]
                    loss += e * e
            else:
                loss = _group_loss(buf, wg, u, d, j0, g, s, z, top)
            if loss < best:
                best, bs, bz = loss, s, z
    return bs, bz


@njit(parallel=True, fastmath=True, cache=True)
def ldlq_rows(w, u, gid, group, top, ratios, mode, fixed, scale, zero, out):
    """One-sided. w [R, C] (columns in visiting order), u [C, C]; writes out, scale, zero [R, groups]."""
    rows, cols = w.shape
    d = np.diag(u).copy()
    for i in prange(rows):
        row = w[i].copy()
        buf = np.empty(group, np.float32)
        for j in range(cols):
            if not fixed and j % group == 0:
                s, z = _fit(buf, row[j : j + group], u, d, j, min(group, cols - j), top, ratios, mode)
                scale[i, j // group] = s
                zero[i, j // group] = z
            g = gid[j]
            q = _q(row[j], scale[i, g], zero[i, g], top)
            out[i, j] = q
            e = (row[j] - q) / d[j]
            for k in range(j + 1, cols):
                row[k] -= e * u[j, k]


@njit(fastmath=True, cache=True)
def ldlq_two(w, u, v, group, top, ratios, mode, scale, zero, out):
    """Two-sided: rows in order, feeding each row's error to the later rows through v [R, R] (upper inverse factor of the output metric)."""
    rows, cols = w.shape
    d = np.diag(u).copy()
    buf = np.empty(group, np.float32)
    w = w.copy()
    row = np.empty(cols, np.float32)
    for i in range(rows):
        for j in range(cols):
            row[j] = w[i, j]
        for j in range(cols):
            if j % group == 0:
                s, z = _fit(buf, row[j : j + group], u, d, j, min(group, cols - j), top, ratios, mode)
                scale[i, j // group] = s
                zero[i, j // group] = z
            q = _q(row[j], scale[i, j // group], zero[i, j // group], top)
            out[i, j] = q
            e = (row[j] - q) / d[j]
            for k in range(j + 1, cols):
                row[k] -= e * u[j, k]
        for k in range(i + 1, rows):
            f = v[i, k] / v[i, i]
            if f != 0.0:
                for j in range(cols):
                    w[k, j] -= f * (w[i, j] - out[i, j])


@njit(fastmath=True, cache=True)
def sweep_two(q, e, h, gmat, group, top, scale, zero, sweeps):
    """Coordinate descent on tr(G E H E^T), E = q - target, given scales. Keeps P = G E H up to date for the row in hand."""
    rows, cols = q.shape
    changed = 0
    for _ in range(sweeps):
        for i in range(rows):
            # row i of G E, then times H
            ge = np.zeros(cols, np.float32)
            for k in range(rows):
                f = gmat[i, k]
                if f != 0.0:
                    for j in range(cols):
                        ge[j] += f * e[k, j]
            p = np.zeros(cols, np.float32)
            for k in range(cols):
                f = ge[k]
                for j in range(cols):
                    p[j] += f * h[k, j]
            gi = gmat[i, i]
            for j in range(cols):
                s, z = scale[i, j // group], zero[i, j // group]
                want = q[i, j] - p[j] / (gi * h[j, j])
                new = _q(want, s, z, top)
                delta = new - q[i, j]
                if delta != 0.0:
                    changed += 1
                    q[i, j] = new
                    e[i, j] += delta
                    f = gi * delta
                    for k in range(cols):
                        p[k] += f * h[j, k]
    return changed


@njit(parallel=True, fastmath=True, cache=True)
def sweep_one(q, e, h, gid, top, scale, zero, sweeps):
    rows, cols = q.shape
    for i in prange(rows):
        p = np.zeros(cols, np.float32)
        for k in range(cols):
            f = e[i, k]
            for j in range(cols):
                p[j] += f * h[k, j]
        for _ in range(sweeps):
            for j in range(cols):
                want = q[i, j] - p[j] / h[j, j]
                new = _q(want, scale[i, gid[j]], zero[i, gid[j]], top)
                delta = new - q[i, j]
                if delta != 0.0:
                    q[i, j] = new
                    e[i, j] += delta
                    for k in range(cols):
                        p[k] += delta * h[j, k]
