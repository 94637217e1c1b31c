"""Products straight from packed codes on the CPU: 4-bit and 8-bit weights of any grid, float32 sums, no memory beside the stored parts.

For one token, codes are decoded in registers; for a few, a row at a time in cache; for many, some rows at a time for torch's matrix product. Scales
that are quantised themselves (NF4 with double quantisation, the super-blocks of Q4_K and IQ4_XS, the E8M0 of MXFP4, the E4M3 of NVFP4) stay so in
memory and are decoded on the way, so a weight takes the bytes that its scheme says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fewbit.base.errors import InputError
from fewbit.num.blocks import EACH, TENSOR, Blocks
from fewbit.num.grid import E4M3, E5M2, Grid, IntGrid, VectorGrid
from fewbit.num.qtensor import QTensor, expand, level_table, values_of
from fewbit.num.scheme import Scheme
from fewbit.runtime.kernels import packed
from fewbit.runtime.parts import PARTS, code_width, pack_codes

FEW = 8  # tokens up to which rows are decoded and multiplied here
RUN = 128  # columns that are summed before a scale is applied, at most
CHUNK = 1 << 22  # weights decoded at a time for many tokens: 16 MiB of float32
_NONE = torch.zeros(0)
_NO_CODES = torch.zeros(0, dtype=torch.uint8)
_ONE, _ZERO = torch.ones(1), torch.zeros(1)

Held = Mapping[str, torch.Tensor]


def accepts(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """Codes of 4 or 8 bits with a scale per group, row, tile or tensor, on the CPU."""
    if device.type != "cpu":
        return f"serves the CPU, got {device.type}"
    if len(shape) != 2:
        return f"needs a matrix, got a weight of shape {tuple(shape)}"
    kind = _kind(scheme)
    if kind is None:
        return f"needs codes of 4 bits, 8-bit integers or 8-bit floats, got {scheme.grid.name}"
    if scheme.scale is None:
        return "needs a scale"
    cols, least = shape[1], 16 if kind == 0 else 32
    size = _columns(scheme.blocks, cols)
    if not cols or cols % 32 or cols % size or (size % 32 and size != least):
        return f"needs rows of whole groups of a multiple of 32 columns, got {size} of {cols}"
    counts = scheme.block_counts(shape)
    for name, part in scheme.parts():
        if not _readable(part, counts[-1]):
            return f"cannot read a {name} stored as {part}"
    return None


def _kind(scheme: Scheme) -> int | None:
    """How the loops read codes."""
    grid, width = scheme.grid, code_width(scheme.grid)
    if isinstance(grid, VectorGrid):
        return None
    if width == 4:
        return 0
    if grid in (E4M3, E5M2):
        return 2 if grid == E4M3 else 3
    return 1 if isinstance(grid, IntGrid) and grid.bits == 8 else None


def _columns(blocks: Blocks, cols: int) -> int:
    """Columns that share a scale."""
    return min(blocks.cols or cols, cols) if not blocks.flat else blocks.cols or cols


def _readable(part: Scheme, cols: int) -> bool:
    """Entries stored directly, or as codes of at most 8 bits times a stored scale, plus one offset for all; `cols` entries per row."""
    if part.is_leaf:
        return part.blocks in (EACH, TENSOR)
    if code_width(part.grid) is None or isinstance(part.grid, VectorGrid) or part.code_shift is not None:
        return False
    if part.scale is None or not part.scale.is_leaf or part.scale.blocks != EACH:
        return False
    whole = (
        part.blocks.flat or part.blocks == TENSOR or (part.blocks.rows == 1 and cols % (part.blocks.cols or cols) == 0)
    )
    return whole and (part.value_shift is None or (part.value_shift.is_leaf and part.value_shift.blocks == TENSOR))


def to_layout(q: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The stored parts; codes of scales in a byte each.

    Raises:
        InputError: FB-E0908 when a code stands for no number.
    """
    held = packed.to_layout(q, dtype)
    if q.scheme.grid == E4M3 and bool(((held["codes"] & 127) == 127).any()):
        raise InputError("FB-E0908", f"a weight stored as {q.scheme} holds NaN")
    for name in PARTS:
        stored = getattr(q, name)
        if isinstance(stored, QTensor):
            held[f"{name}_codes"] = stored.codes.reshape(q.scheme.block_counts(q.shape)).contiguous()
    return held


def from_layout(scheme: Scheme, shape: tuple[int, ...], held: Held) -> QTensor:
    parts = dict(held)
    for name, part in scheme.parts():
        if not part.is_leaf:
            parts[f"{name}_codes"] = pack_codes(part.grid, held[f"{name}_codes"])
    return packed.from_layout(scheme, shape, parts)


@functools.cache
def _byte_levels(grid: Grid) -> torch.Tensor:
    """float32 [256]: the level that a byte stands for, signed integers as two's complement; zero beyond the grid."""
    if isinstance(grid, IntGrid):
        values = torch.arange(256)
        return (values if not grid.signed else (values ^ 128) - 128).float()
    levels = level_table(grid, torch.device("cpu"))
    return torch.cat([levels, torch.zeros(256 - levels.numel())])


@functools.cache
def _nibble_levels(grid: Grid) -> torch.Tensor:
    """float32 [16]: the level of every packed 4-bit code."""
    if isinstance(grid, IntGrid):
        values = torch.arange(16)
        return (values if not grid.signed else (values ^ 8) - 8).float()
    levels = level_table(grid, torch.device("cpu"))
    return torch.cat([levels, torch.zeros(16 - levels.numel())])


def _array(part: Scheme | None, held: Held, name: str, counts: tuple[int, ...], factor: float) -> tuple[Any, ...]:
    """Entries per block as `direct_loops` takes them, multiplied by a factor."""
    if part is None:
        return _numpy(_NONE, _NO_CODES, _NONE, _NONE, 1, _ZERO)
    if not part.is_leaf:
        per = part.blocks.cols or (counts[-1] if part.blocks.rows == 1 else counts[-1] * counts[-2])
        codes = held[f"{name}_codes"].reshape(-1).view(torch.uint8)
        outer = held[f"{name}_scale"].reshape(-1).float() * factor
        shift = held[f"{name}_value_shift"].reshape(1).float() * factor if part.value_shift is not None else _ZERO
        return _numpy(_NONE, codes, _byte_levels(part.grid), outer, per, shift)
    stored = held[name]
    if stored.element_size() == 1 and part.blocks == EACH:
        return _numpy(
            _NONE, stored.reshape(-1).view(torch.uint8), _byte_levels(part.grid), _ONE * factor, 1 << 62, _ZERO
        )
    values = expand(values_of(stored), part, counts).reshape(-1)
    return _numpy(values * factor if factor != 1 else values.contiguous(), _NO_CODES, _NONE, _NONE, 1, _ZERO)


def _numpy(
    plain: torch.Tensor, codes: torch.Tensor, table: torch.Tensor, outer: torch.Tensor, per: int, offset: torch.Tensor
) -> tuple[Any, ...]:
    return plain.numpy(), codes.numpy(), table.numpy(), outer.numpy(), per, offset.numpy()


def _arguments(held: Held, scheme: Scheme, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """(kind, codes, table, arrays, form) of `direct_loops.times`."""
    rows, cols = shape
    kind, counts = _kind(scheme), scheme.block_counts(shape)
    assert kind is not None
    size = _columns(scheme.blocks, cols)
    run = max(size_ for size_ in (128, 64, 32) if max(size, 32) % size_ == 0)
    groups = cols // size
    lines = 1 if scheme.blocks.flat or scheme.blocks.rows == 1 else scheme.blocks.rows or rows
    factor = 256.0 if scheme.grid == E4M3 else 1.0  # vectors.e4m3
    arrays = (
        _array(scheme.scale, held, "scale", counts, factor),
        _array(scheme.code_shift, held, "code_shift", counts, 1.0 / factor),
        _array(scheme.value_shift, held, "value_shift", counts, 1.0),
    )
    codes = held["codes"].reshape(-1)
    table = _nibble_levels(scheme.grid) if kind == 0 else _NONE
    form = np.array((cols, run, max(size // run, 1), size < run, groups, lines, rows), dtype=np.int64)
    return kind, codes.numpy(), table.numpy(), arrays, form


def matmul(x: torch.Tensor, held: Held, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """x [tokens, cols] @ w.T -> [tokens, rows] in x's dtype; sums in float32."""
    from fewbit.runtime.kernels.direct_loops import times

    rows, tokens = shape[0], x.shape[0]
    kind, codes, table, arrays, form = _arguments(held, scheme, shape)
    natural = x.float()
    inputs = torch.cat([natural[:, ::2], natural[:, 1::2]], dim=1) if kind == 0 else natural.contiguous()
    if tokens > FEW:
        return _many(inputs, x.dtype, (kind, codes, table, arrays, form), shape)
    out = torch.empty((tokens, rows), dtype=torch.float32)
    sums = _NONE
    if tokens == 1 and not scheme.symmetric:
        sums = natural.reshape(int(form[4]), -1).sum(-1)
    if tokens and rows:
        times(kind, codes, table, arrays, inputs.reshape(-1).numpy(), sums.numpy(), form, out.numpy())
    return out.to(x.dtype)


def _many(x: torch.Tensor, dtype: torch.dtype, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """Some rows at a time through torch's matrix product; x float32 [tokens, cols] in the loops' order of columns."""
    from fewbit.runtime.kernels.direct_loops import decoded

    rows, cols = shape
    compute = packed.compute_dtype(dtype, x.device)
    x = x.to(compute)
    out = torch.empty((x.shape[0], rows), dtype=dtype)
    step = max(1, min(rows, CHUNK // cols))
    buffer = torch.empty(step * cols)
    kind, codes, table, arrays, form = arguments
    for first in range(0, rows, step):
        last = min(rows, first + step)
        decoded(kind, codes, table, arrays, form, first, last, buffer.numpy())
        w = buffer[: (last - first) * cols].reshape(-1, cols).to(compute)
        out[:, first:last] = x @ w.T
    return out
