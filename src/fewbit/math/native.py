"""The plain range with every step in the dtype of the weights: the arithmetic of compressed-tensors' own quantiser.

    s = (max - min) / (high - low)        z = round(low - min / s)        code = round(clamp(x / s + z))

all in bfloat16 for bfloat16 weights, zero always inside the range, and (high - low) / 2 steps to the largest weight where there is no
zero point. Codes are signed here whatever the scheme stores: in bfloat16 an offset would round elsewhere. It is less exact than `fit` and
`snap`, which compute in float32; it serves those who must reproduce what llm-compressor's round-to-nearest writes, byte for byte, and as
the baseline of comparisons.
"""

from __future__ import annotations

import torch

from fewbit.base.errors import InputError
from fewbit.math.rounding import pack_leaf
from fewbit.math.tiles import Chunk, chunks, require_finite
from fewbit.num.grid import IntGrid
from fewbit.num.qtensor import QTensor, code_dtype
from fewbit.num.scheme import Scheme


def quantize(scheme: Scheme, w: torch.Tensor) -> QTensor:
    """Round to nearest under the plain range, in the arithmetic of `w`'s dtype.

    Args:
        scheme: integer codes with a scale, and maybe a code shift, stored per block.
        w: floating [*batch, rows, cols], finite.

    Returns:
        The quantised tensor; its scale is in `w`'s dtype rounded to the scheme's own.

    Raises:
        InputError: FB-E0601 for other schemes, FB-E0702 for non-finite weights.
    """
    grid, tiling = scheme.grid, scheme.blocks.resolve(tuple(w.shape))
    plain = scheme.value_shift is None and all(part.is_leaf for _, part in scheme.parts())
    if not plain or not isinstance(grid, IntGrid) or scheme.scale is None:
        raise InputError(
            "FB-E0601",
            f"search=native computes as compressed-tensors does: integer codes and one scale a block, not {scheme}",
            remedy="choose search=absmax, which takes every scheme",
        )
    require_finite(w)
    low, span = -(1 << grid.bits - 1), grid.high - grid.low
    counts = scheme.block_counts(tuple(w.shape))
    scales = torch.empty(counts, dtype=w.dtype, device=w.device)
    shifts = torch.zeros_like(scales)
    codes = torch.empty(tiling.view, dtype=code_dtype(grid), device=w.device)
    rows = codes.view(-1, tiling.rows, tiling.cols)
    for chunk in chunks(w, None, scheme.blocks):
        scale, shift = _range(low, span, chunk, scheme.code_shift is not None)
        chunk.put(scales.view(-1, *counts[-2:]), scale)
        chunk.put(shifts.view(-1, *counts[-2:]), shift + (grid.low - low))
        found = (chunk.raw / scale + shift).clamp_(low, low + span).round_()
        found = (found.to(torch.int16) + (grid.low - low)).to(codes.dtype)
        b, r, _, c, _ = chunk.index
        r, c = r * tiling.block_rows, c * tiling.block_cols
        rows[b, r : r + chunk.extent[0], c : c + chunk.extent[1]] = chunk.unblock(found)
    zero = None if scheme.code_shift is None else pack_leaf(scheme.code_shift.grid, shifts)
    return QTensor(scheme, tuple(w.shape), codes.view(w.shape), pack_leaf(scheme.scale.grid, scales), zero)


def _range(lowest: int, span: int, chunk: Chunk, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero point of signed codes), each [n, 1, m, 1] in the dtype of the weights."""
    low = chunk.raw.amin(dim=(1, 3), keepdim=True).clamp_(max=0)
    high = chunk.raw.amax(dim=(1, 3), keepdim=True).clamp_(min=0)
    scale = (high - low) / span if shifted else torch.maximum(-low, high) / (span / 2)
    empty = scale == 0
    scale = torch.where(empty, torch.finfo(scale.dtype).eps, scale)
    shift = (lowest - low / scale).clamp_(lowest, lowest + span).round_() if shifted else torch.zeros_like(scale)
    return scale, shift.masked_fill_(empty, 0)  # they divide 0 by 0 there, and NaN becomes 0
