"""Error feedback inside one block of columns on CUDA: a Triton program per tile of rows.

The same arithmetic as `kernels.gptq.round_rows` and the plain `solve.gptq_loop.round_block`, in the same order per row: a tile's targets stay in
registers from the first column to the last, so a block of columns costs one launch where plain torch needs some fifteen per column.

    for each column j of the block:
        first of its group    try every candidate on the rest of the group, keep the one that loses least (per row)
        round x_j, e = w_j - value, x_k += e upper[j, k] for k > j

Triton is no dependency: this module is imported where `kernels.has_triton` says so. With TRITON_INTERPRET=1 the kernel runs on the CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 16  # rows of a program: registers hold TILE x columns of targets


@triton.jit
def _nearest(u, edges, count, uniform: tl.constexpr, low, high, rounds: tl.constexpr):
    """Index of the nearest level as float32: half to even for integers; a tie between other levels goes down."""
    if uniform:
        bounded = tl.minimum(tl.maximum(u, low), high)
        return (bounded + 12582912.0) - 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, half to even
    first = tl.zeros_like(u).to(tl.int32)
    last = first + count
    for _ in tl.static_range(rounds):
        middle = (first + last) // 2
        open_ = first < last
        edge = tl.load(edges + tl.minimum(middle, count - 1), mask=open_, other=0.0)
        below = open_ & (edge < u)
        last = tl.where(open_ & (edge >= u), middle, last)
        first = tl.where(below, middle + 1, first)
    return first.to(tl.float32)


@triton.jit
def _decoded(x, s, z, v, levels, edges, count, uniform: tl.constexpr, low, high, rounds: tl.constexpr):
    """(index, value) nearest to x under scale s, code shift z and value shift v."""
    safe = tl.where(s == 0.0, 1.0, s)
    u = tl.where(s == 0.0, z, tl.div_rn(x - v, safe) + z)
    index = _nearest(u, edges, count, uniform, low, high, rounds)
    if uniform:
        level = index
    else:
        level = tl.load(levels + index.to(tl.int32))
    return index, (level - z) * s + v


@triton.jit
def _round(
    w_ptr, x_ptr, upper_ptr, weight_ptr, scale_ptr, zero_ptr, shift_ptr, gid_ptr, end_ptr, levels, edges,
    codes_ptr, out_ptr, choice_ptr, loss_ptr, rows, cols, groups, count, low, high,
    candidates: tl.constexpr, uniform: tl.constexpr, rounds: tl.constexpr, TILE_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.arange(0, WIDTH)
    here = row < rows
    place = row[:, None] * cols + col[None, :]
    inside = here[:, None] & (col < cols)[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0)
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    loss = tl.zeros([TILE_ROWS], tl.float64)
    chosen = tl.zeros([TILE_ROWS], tl.int32)
    for j in range(cols):
        g = tl.load(gid_ptr + j)
        end = tl.load(end_ptr + j)  # past the last column of the group where one begins, else 0
        base = (row * groups + g) * candidates
        if candidates > 1:  # noqa: SIM102  (known when the kernel is compiled; the inner one is not)
            if end > 0:
                least = tl.full([TILE_ROWS], float("inf"), tl.float32)
                for c in range(candidates):
                    s = tl.load(scale_ptr + base + c, mask=here, other=1.0)
                    z = tl.load(zero_ptr + base + c, mask=here, other=0.0)
                    v = tl.load(shift_ptr + base + c, mask=here, other=0.0)
                    trial = x
                    total = tl.zeros([TILE_ROWS], tl.float32)
                    for k in range(j, end):
                        at = (col == k)[None, :]
                        xk = tl.sum(tl.where(at, trial, 0.0), 1)
                        wk = tl.sum(tl.where(at, w, 0.0), 1)
                        _, value = _decoded(xk, s, z, v, levels, edges, count, uniform, low, high, rounds)
                        miss = xk - value
                        total += tl.load(weight_ptr + k) * miss * miss
                        fed = tl.load(upper_ptr + k * cols + col, mask=(col > k) & (col < end), other=0.0)
                        trial += (wk - value)[:, None] * fed[None, :]
                    better = total < least
                    least = tl.where(better, total, least)
                    chosen = tl.where(better, c, chosen)
                tl.store(choice_ptr + row * groups + g, chosen, mask=here)
        s = tl.load(scale_ptr + base + chosen, mask=here, other=1.0)
        z = tl.load(zero_ptr + base + chosen, mask=here, other=0.0)
        v = tl.load(shift_ptr + base + chosen, mask=here, other=0.0)
        at = (col == j)[None, :]
        xj = tl.sum(tl.where(at, x, 0.0), 1)
        wj = tl.sum(tl.where(at, w, 0.0), 1)
        index, value = _decoded(xj, s, z, v, levels, edges, count, uniform, low, high, rounds)
        tl.store(codes_ptr + row * cols + j, index.to(tl.int32), mask=here)
        tl.store(out_ptr + row * cols + j, value, mask=here)
        miss = xj - value
        loss += (tl.load(weight_ptr + j) * miss * miss).to(tl.float64)
        fed = tl.load(upper_ptr + j * cols + col, mask=(col > j) & (col < cols), other=0.0)
        x += (wj - value)[:, None] * fed[None, :]
    tl.store(x_ptr + place, x, mask=inside)
    tl.store(loss_ptr + row, tl.load(loss_ptr + row, mask=here, other=0.0) + loss, mask=here)


def round_rows(
    w: torch.Tensor,
    x: torch.Tensor,
    upper: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    shift: torch.Tensor,
    gid: torch.Tensor,
    uniform: bool,
    low: float,
    high: float,
    levels: torch.Tensor,
    edges: torch.Tensor,
    codes: torch.Tensor,
    out: torch.Tensor,
    choice: torch.Tensor,
    loss: torch.Tensor,
) -> None:
    """All rows of a block, independently; arguments as for `kernels.gptq.round_rows`, as tensors on one device.

    Args:
        w, x: float32 [rows, cols], contiguous; x is used up.
        scale, zero, shift: float32 [rows, groups, candidates]; gid: int32 [cols].
        codes, out, choice, loss: written; `loss` is added to.
    """
    rows, cols = x.shape
    if not rows or not cols:
        return
    ends = torch.zeros(cols, dtype=torch.int32, device=x.device)
    starts = torch.ones(cols, dtype=torch.bool, device=x.device)
    starts[1:] = gid[1:] != gid[:-1]
    where = torch.nonzero(starts)[:, 0].to(torch.int32)
    ends[where.long()] = torch.cat([where[1:], where.new_tensor([cols])])
    count = int(edges.numel())
    arrays = [t.contiguous() for t in (upper, weight, scale, zero, shift, gid.to(torch.int32), ends, levels, edges)]
    _round[(-(-rows // TILE),)](
        w, x, *(array.to(x.device) for array in arrays), codes, out, choice, loss,
        rows, cols, scale.shape[1], count, float(low), float(high),
        candidates=scale.shape[2], uniform=uniform, rounds=max(1, count.bit_length()), TILE_ROWS=TILE, WIDTH=_power(cols),
    )  # fmt: skip


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
