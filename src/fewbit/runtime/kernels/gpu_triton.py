"""The Triton kernel behind `runtime.kernels.gpu`; imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 64  # output features of a program
DEEP = 64  # columns per step, at most: one scale serves them all


@triton.jit
def _values(code, levels, table: tl.constexpr, signed: tl.constexpr, half: tl.constexpr):
    """Codes as the numbers of their grid, float32."""
    if table:
        return tl.load(levels + code.to(tl.int32))
    number = code.to(tl.int32)
    if signed:
        number = tl.where(number >= half, number - 2 * half, number)
    return number.to(tl.float32)


@triton.jit
def _product(
    x_ptr, codes_ptr, pairs_ptr, levels, y_ptr, tokens, rows, cols, groups, group,
    four: tl.constexpr, table: tl.constexpr, signed: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_m, in_n = m < tokens, n < rows
    k = tl.arange(0, DEEP // 2)  # pairs of columns, or columns of each half
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, cols, DEEP):
        pair = (n * groups + start // group) * 2
        scale = tl.load(pairs_ptr + pair, mask=in_n, other=0.0)
        offset = tl.load(pairs_ptr + pair + 1, mask=in_n, other=0.0)
        if four:
            byte = tl.load(
                codes_ptr + n[:, None] * (cols // 2) + (start // 2 + k)[None, :], mask=in_n[:, None], other=0
            )
            first, second = byte & 15, byte >> 4
            left, right = start + 2 * k, start + 2 * k + 1
        else:
            left, right = start + k, start + DEEP // 2 + k
            first = tl.load(codes_ptr + n[:, None] * cols + left[None, :], mask=in_n[:, None], other=0)
            second = tl.load(codes_ptr + n[:, None] * cols + right[None, :], mask=in_n[:, None], other=0)
        half: tl.constexpr = 8 if four else 128
        x_left = tl.load(x_ptr + m[:, None] * cols + left[None, :], mask=in_m[:, None], other=0.0)
        x_right = tl.load(x_ptr + m[:, None] * cols + right[None, :], mask=in_m[:, None], other=0.0)
        w_left = _values(first, levels, table, signed, half) * scale[:, None] + offset[:, None]
        w_right = _values(second, levels, table, signed, half) * scale[:, None] + offset[:, None]
        total = tl.dot(x_left, tl.trans(w_left).to(x_left.dtype), total, input_precision="ieee")
        total = tl.dot(x_right, tl.trans(w_right).to(x_right.dtype), total, input_precision="ieee")
    tl.store(y_ptr + m[:, None] * rows + n[None, :], total, mask=in_m[:, None] & in_n[None, :])


def product(
    x: torch.Tensor,
    codes: torch.Tensor,
    pairs: torch.Tensor,
    levels: torch.Tensor | None,
    rows: int,
    cols: int,
    group: int,
    four: bool,
    signed: bool,
) -> torch.Tensor:
    """x [tokens, cols] times the weight -> float32 [tokens, rows].

    Args:
        x: float32, float16 or bfloat16, contiguous.
        codes: uint8 [rows, cols], or [rows, cols / 2] with the even column in the low nibble.
        pairs: float32 [rows, groups, 2], (scale, offset). levels: float32 by code, or None for integers.
        group: columns that share a pair, a multiple of 32.
        four, signed: whether codes have 4 bits; whether integers are two's complements.
    """
    tokens = x.shape[0]
    out = torch.empty(tokens, rows, dtype=torch.float32, device=x.device)
    if not tokens or not rows:
        return out
    deep = DEEP if group % DEEP == 0 else 32
    block = 16 if tokens <= 16 else 64
    grid = (triton.cdiv(tokens, block), triton.cdiv(rows, ROWS))
    _product[grid](
        x, codes, pairs, pairs if levels is None else levels, out, tokens, rows, cols, cols // group, group,
        four=four, table=levels is not None, signed=signed, TOKENS=block, ROWS=ROWS, DEEP=deep,
    )  # fmt: skip
    return out
