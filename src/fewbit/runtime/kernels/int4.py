"""Weight-only int4 on the CPU through torch's packed product (`_weight_int4pack_mm_for_cpu`).

torch computes  w = (u - 8) * scale + zero  with u in 0 … 15 and one (scale, zero) per row and group of 32, 64, 128 or 256 columns. Every 4-bit
integer scheme is of that form, whatever its scales and shifts are stored as: Q4_K, GPTQ, HQQ and MLX groups alike. The stored scales are kept
beside the table of (scale, zero), so the layout gives back exactly what it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.num.grid import IntGrid
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.runtime.kernels.packed import block_arrays
from fewbit.runtime.parts import flatten, pack_codes, rebuild

GROUPS = (256, 128, 64, 32)  # columns per (scale, zero) that torch's kernel knows
ROWS = 16  # rows come in multiples of this; we pad
SLAB = 64  # rows that torch interleaves among themselves, at most

Held = Mapping[str, torch.Tensor]


def accepts(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """4-bit integers in groups of a multiple of 32 columns, on the CPU."""
    grid, blocks = scheme.grid, scheme.blocks
    if device.type != "cpu":
        return f"serves the CPU, got {device.type}"
    if not isinstance(grid, IntGrid) or grid.bits != 4:
        return f"needs 4-bit integers, got {grid.name}"
    if scheme.activation is not None:
        return "computes with float activations"
    if scheme.is_leaf or blocks.flat or blocks.rows != 1:
        return f"needs scales per group or row, got {blocks.spelling}"
    size = blocks.cols or shape[-1]
    if size % GROUPS[-1] or shape[-1] % size:
        return f"needs groups of a multiple of 32 that divide in_features, got {size} of {shape[-1]}"
    return None


def _group(scheme: Scheme, cols: int) -> int:
    size = scheme.blocks.cols or cols
    return next(group for group in GROUPS if size % group == 0)


def to_layout(q: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`int4` (torch's order), `table` [groups, rows, 2] of `dtype`, and the stored scales and shifts."""
    held = flatten(q)
    del held["codes"]
    rows, cols = q.shape
    middle = 8 if q.scheme.grid.low < 0 else 0
    packed = [_packed(slab, middle) for slab in q.codes.reshape(rows, cols).split(4 * SLAB)]
    held["int4"] = torch.cat(packed)
    held["table"] = _table(q.scheme, (rows, cols), held, 8 - middle).to(dtype)
    return held


def _packed(codes: torch.Tensor, middle: int) -> torch.Tensor:
    """Codes [rows, cols] of whole slabs (the last may be short) in torch's order, which asks for int32: eight times the bytes of what it makes."""
    wide = torch.nn.functional.pad(codes.to(torch.int32) + middle, (0, 0, 0, -codes.shape[0] % ROWS))
    return torch._convert_weight_to_int4pack_for_cpu(wide.contiguous(), 2)


def _table(scheme: Scheme, shape: tuple[int, ...], held: Held, middle: int) -> torch.Tensor:
    """(scale, zero) of torch's formula, float32 [groups, padded rows, 2]; padded rows are zero."""
    rows, cols = shape
    arrays = block_arrays(scheme, shape, held)
    scale = arrays.get("scale", torch.ones(1))
    zero = (middle - arrays.get("code_shift", torch.zeros(1))) * scale + arrays.get("value_shift", torch.zeros(1))
    pair = torch.stack(torch.broadcast_tensors(scale, zero), dim=-1)  # [rows, blocks, 2]
    pair = pair.repeat_interleave((scheme.blocks.cols or cols) // _group(scheme, cols), dim=1)
    return torch.nn.functional.pad(pair.transpose(0, 1), (0, 0, 0, -rows % ROWS)).contiguous()


def from_layout(scheme: Scheme, shape: tuple[int, ...], held: Held) -> QTensor:
    rows, cols = shape
    codes = _unpack(held["int4"], cols)[:rows].to(torch.int8)
    codes = codes - 8 if scheme.grid.low < 0 else codes.to(torch.uint8)
    stored = {name: tensor for name, tensor in held.items() if name not in ("int4", "table")}
    return rebuild(scheme, shape, {**stored, "codes": pack_codes(scheme.grid, codes)})


def _unpack(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """Codes uint8 [rows, cols] of torch's order, which torch itself tells: what it does to the digits of every position."""
    slabs, order = [], {}
    for slab in packed.split(SLAB):
        rows = slab.shape[0]
        if rows not in order:
            order[rows] = _positions(rows, cols)
        codes = torch.empty(rows * cols, dtype=torch.uint8)
        codes[order[rows]] = _nibbles(slab)
        slabs.append(codes.reshape(rows, cols))
    return torch.cat(slabs)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    flat = packed.contiguous().reshape(-1)
    return torch.stack([flat & 15, flat >> 4], dim=-1).reshape(-1)


def _positions(rows: int, cols: int) -> torch.Tensor:
    """Where each packed nibble comes from: int64 [rows * cols] positions in row-major order."""
    index = torch.arange(rows * cols)
    found = torch.zeros(rows * cols, dtype=torch.int64)
    for shift in range(0, max(4, (rows * cols - 1).bit_length()), 4):
        digits = ((index >> shift) & 15).to(torch.int32).reshape(rows, cols)
        found |= _nibbles(torch._convert_weight_to_int4pack_for_cpu(digits, 2)).long() << shift
    return found


def matmul(x: torch.Tensor, held: Held, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """x [tokens, cols] @ w.T -> [tokens, rows] in x's dtype; computed in the table's."""
    table = held["table"]
    out = torch._weight_int4pack_mm_for_cpu(
        x.to(table.dtype).contiguous(), held["int4"], _group(scheme, shape[1]), table
    )
    return out[:, : shape[0]].to(x.dtype)
